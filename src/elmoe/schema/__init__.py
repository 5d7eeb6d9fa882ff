"""Frozen types that cross a seam between packages. Knows no file, no clock and no array."""
