"""What a device is, whether a model fits on it, and the machine that takes it from release to release."""
