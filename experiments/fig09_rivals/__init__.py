"""The study of rivals."""
