"""The pure core: decisions without IO, clock, chance, environment or logging (numpy in ``search`` only)."""
