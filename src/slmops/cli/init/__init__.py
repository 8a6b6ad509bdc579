"""``slmops init``."""
