"""Hugging Face checkpoint -> store, tensor by tensor. Knows nothing of how a model computes."""

from elmoe.convert.convert import convert_checkpoint, schema_of_config

__all__ = ["convert_checkpoint", "schema_of_config"]
