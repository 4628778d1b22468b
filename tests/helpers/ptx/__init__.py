"""Executes the PTX which Triton compiles for NVIDIA GPUs on the CPU, with the checks of compute-sanitizer.

parse: text to instructions; translate: instructions to Python; values and matrices: what instructions compute; memory:
what they may access; run: blocks of threads; count: what they ask of a device; driver: launches by Triton come here.
"""
