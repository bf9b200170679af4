"""Files, pipes, signals and threads."""
