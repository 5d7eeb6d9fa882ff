"""The study of validation."""
