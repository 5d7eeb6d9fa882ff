"""The study of drafts."""
