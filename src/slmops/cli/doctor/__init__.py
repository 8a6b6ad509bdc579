"""``slmops doctor``."""
