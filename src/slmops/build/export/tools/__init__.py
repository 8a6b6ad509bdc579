"""Scripts that a toolchain's interpreter runs, one a runtime: export a model, and answer questions about an exported one.

Run as files (``python .../tools/genai.py REQUEST.json``), never imported by slmops: they import torch and engines' bindings,
which only their toolchain has, and of slmops only what lies beside them.
"""
