"""LiteRT: `adapter` has `litert` and `litert-lm` (agents), `engine` the child, the only module that imports the binding."""
