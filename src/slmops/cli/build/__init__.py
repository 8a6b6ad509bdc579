"""``slmops build``."""
