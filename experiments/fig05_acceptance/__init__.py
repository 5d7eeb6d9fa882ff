"""The study of acceptance."""
