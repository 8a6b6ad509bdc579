"""What applications on the device see: an OpenAI-compatible API on loopback, in front of whichever engine is active."""
