"""``slmops profile``."""
