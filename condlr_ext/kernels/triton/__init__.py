"""Triton kernels. Only the modules of the wings import Triton, on first use."""
