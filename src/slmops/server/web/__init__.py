"""The dashboard: pages for people, rendered on the server, without scripts from anywhere else."""
