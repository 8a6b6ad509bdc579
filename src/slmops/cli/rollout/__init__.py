"""``slmops rollout``."""
