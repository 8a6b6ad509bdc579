"""Everything that a device writes: atomic files, the journal, slots, artifacts by digest. No database (ADR 0005)."""
