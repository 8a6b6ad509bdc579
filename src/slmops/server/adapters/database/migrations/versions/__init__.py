"""One file a step, append-only."""
