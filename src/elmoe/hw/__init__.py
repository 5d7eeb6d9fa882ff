"""Costs of hardware: what memories, arrays and links take in time and energy. Knows no system, no model and no engine."""
