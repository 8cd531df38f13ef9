"""What is decided before a run, from sizes: where bytes go."""
