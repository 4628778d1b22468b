"""One step of the optimizer on all layers of a network."""
