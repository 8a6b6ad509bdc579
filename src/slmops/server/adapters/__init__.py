"""The only rooms that know a database, a disk, a clock or chance."""
