"""Random cases for the promises of linalg, of the optimizers and of everything that reads files: `make fuzz`."""
