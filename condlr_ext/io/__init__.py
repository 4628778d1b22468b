"""Files: checkpoints, LoRA adapters, and importers of other packages' checkpoints."""

__all__ = ["checkpoint", "importers", "lora"]
