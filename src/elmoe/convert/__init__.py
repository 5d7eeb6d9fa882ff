"""Hugging Face checkpoint or GGUF file -> store, and store -> GGUF file, tensor by tensor. Knows nothing of how a model
computes.
"""

from elmoe.convert.convert import convert_checkpoint

__all__ = ["convert_checkpoint"]
