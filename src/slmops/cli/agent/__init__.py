"""``slmops agent``."""
