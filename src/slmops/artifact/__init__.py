"""Bytes and their names, without IO: GGUF layout, chunk maps, manifests, golden packs, signatures."""
