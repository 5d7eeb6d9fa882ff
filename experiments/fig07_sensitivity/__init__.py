"""The study of sensitivity."""
