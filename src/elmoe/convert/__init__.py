"""Hugging Face checkpoint or GGUF file -> store, and store -> GGUF file, tensor by tensor. Knows nothing of how a model
computes.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elmoe.convert.convert import convert_checkpoint

__all__ = ["convert_checkpoint"]


def __getattr__(name: str) -> Any:
    """Loaded when it is used: whoever starts with a model that is in the cache converts nothing."""
    if name == "convert_checkpoint":
        from elmoe.convert.convert import convert_checkpoint

        return convert_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
