"""slmops: take a small language model from a folder to a fleet of edge devices, and keep it good there."""
