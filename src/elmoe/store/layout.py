"""How many bytes the tensors of a spec take in a store, section by section."""

from __future__ import annotations

from elmoe.bitslice import ExpertLayout
from elmoe.bitslice.expert import PAGE
from elmoe.bitslice.nested import BLOCK_ROWS, GROUP, GROUP_BYTES, ceil_div
from elmoe.models.spec import ModelSpec
from elmoe.models.tensors import FeedForward, Format, Formats, Tensor, feed_forward, tensors

ALIGNMENT = 64
"""Alignment of a section in ``dense.bin``, bytes; tensors begin on pages."""


def tensor_sections(tensor: Tensor, format: Format) -> dict[str, int]:
    """Section -> bytes, in the order in which they lie in the file."""
    if format == "float32":
        count = 4
        for side in tensor.shape:
            count *= side
        return {"data": count}
    rows, columns = tensor.shape
    cells = ceil_div(rows, BLOCK_ROWS) * ceil_div(columns, GROUP)
    return {"hi": cells * GROUP_BYTES, "lo": cells * GROUP_BYTES, "scales": cells * 2 * BLOCK_ROWS}


def record_layout(part: FeedForward) -> ExpertLayout:
    """How one of the experts, or the dense feed-forward, lies in memory."""
    return ExpertLayout(part.hidden, part.width)


def record_sections(part: FeedForward) -> dict[str, int]:
    """Record -> bytes of one expert: its slices."""
    layout = record_layout(part)
    return {"msb": layout.msb_bytes, "lsb": layout.lsb_bytes}


def store_bytes(spec: ModelSpec, formats: Formats) -> int:
    """Bytes of the data files of a store."""
    end, layers = PAGE, 0
    for tensor in tensors(spec):
        end = after_sections(end, tensor_sections(tensor, tensor.format(formats)))[1]
    for layer in range(len(spec.layers)):
        part = feed_forward(spec, layer)
        if part.kind == "dense":
            end = after_sections(end, record_sections(part))[1]
        else:
            layers += PAGE + part.count * sum(record_sections(part).values())
    return ceil_div(end, PAGE) * PAGE + layers


def after_sections(end: int, sections: dict[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of a tensor's sections in a file that ends at ``end``, and where it ends then."""
    offsets, end = {}, ceil_div(end, PAGE) * PAGE
    for section, size in sections.items():
        offsets[section] = end
        end = ceil_div(end + size, ALIGNMENT) * ALIGNMENT
    return offsets, end
