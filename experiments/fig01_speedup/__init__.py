"""The study of speedup."""
