"""Kernels in languages embedded in Python; each module is imported when an op first needs it."""
