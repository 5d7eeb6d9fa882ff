"""Systems: each lowers the passes of a serving step to operations on the resources of a machine."""
