"""Where the claimed speed would hold."""
