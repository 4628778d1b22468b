"""Files: checkpoints, LoRA adapters, and importers of other packages' checkpoints."""
