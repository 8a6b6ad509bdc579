"""The schema of LiteRT files, from where it lives now."""

from ai_edge_litert.schema_py_generated import *  # noqa: F403
