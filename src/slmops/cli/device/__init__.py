"""``slmops device``."""
