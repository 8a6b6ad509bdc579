"""The shell around the device machine: ``driver`` persists and then acts, ``actions`` are the acts."""
