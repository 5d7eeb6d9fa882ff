"""The study of ablation."""
