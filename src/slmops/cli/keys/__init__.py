"""``slmops keys``."""
