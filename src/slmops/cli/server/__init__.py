"""``slmops server``."""
