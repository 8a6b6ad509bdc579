"""Waves over a fleet: who is in which (plan), what evidence says (judge), what happens next (machine)."""
