"""``slmops lab``: every variant of a build on a device of its class, as evidence."""
