"""Studies of the simulator: each folder is one question, one command, one section of the report."""
