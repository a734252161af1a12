"""Where requests run: in this process, or on Ray."""
