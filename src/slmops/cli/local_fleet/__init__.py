"""A whole fleet on this machine, of real processes on loopback: what the demo and the lab stand on."""
