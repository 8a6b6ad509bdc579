"""What agent and server say to each other (``messages``), and the YAML that people write (``documents``)."""
