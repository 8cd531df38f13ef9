"""Where a stage's bytes live."""
