"""``slmops release``."""
