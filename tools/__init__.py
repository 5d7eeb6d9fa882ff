"""Programs that make committed data: the demo model, golden files."""
