"""The products of low-rank layers, forward and backward."""
