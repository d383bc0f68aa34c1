"""lorafit: fine-tune Llama-family models with LoRA on instruction data."""

__version__ = "0.1.0"
