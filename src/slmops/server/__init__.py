"""The control plane: which device should run what, and how a change reaches the fleet.

Inner walls: ``main`` > ``api | web | worker | adapters`` > ``services`` > ``ports``. Decisions are made in ``core``;
``services`` load, ask the core, and write state and outbox in one transaction; ``adapters`` are the only place that
knows a database or a disk.
"""
