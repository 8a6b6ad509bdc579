"""``slmops blueprint``."""
