"""The loop that gives rollouts their turn."""
