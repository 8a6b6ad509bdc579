"""Hugging Face directories as a base: reading them, refusing what is not supported, and converting them to GGUF."""
