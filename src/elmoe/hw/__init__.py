"""What hardware costs: seconds, joules and bytes of single operations on a described machine, and how costs compose."""
