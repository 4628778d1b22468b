"""Factorizations of many small matrices and functions of their singular values: svd, polar, clip_spectrum."""
