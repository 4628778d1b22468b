"""Kernels in Python-embedded languages; nothing here is imported before a call needs it."""
