"""Migrations: they expand, then contract, so that the previous release can still run on the newest schema."""
