"""The study of capacity."""
