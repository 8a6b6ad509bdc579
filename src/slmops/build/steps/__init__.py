"""The steps of a build: one module a subject, each with functions ``StepContext -> JSON value``.

A module's ``USES`` names the modules whose source also decides its results; both are part of the cache key.
"""
