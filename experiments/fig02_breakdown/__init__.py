"""The study of breakdown."""
