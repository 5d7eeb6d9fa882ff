"""The headline at both ends of what is not measured."""
