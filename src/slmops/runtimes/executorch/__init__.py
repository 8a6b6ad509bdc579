"""ExecuTorch: `adapter` is the runtime (agents), `engine` the child, the only module that imports the binding and torch."""
