"""How many bytes the tensors of a spec take in a store, section by section."""

from __future__ import annotations

import hashlib

from elmoe.bitslice import ExpertLayout
from elmoe.bitslice.expert import PAGE
from elmoe.bitslice.nested import ceil_div
from elmoe.models.formats import split_formats
from elmoe.models.spec import ModelSpec
from elmoe.models.tensors import DEFAULT, FLOATS, PROJECTIONS, FeedForward, Formats, Tensor, feed_forwards, tensors

ALIGNMENT = 64
"""Alignment of a section in ``dense.bin``, bytes; tensors begin on pages."""


def tensor_sections(tensor: Tensor, format: str) -> dict[str, int]:
    """Section -> bytes, in the order in which they lie in the file."""
    if format == FLOATS:
        count = 4
        for side in tensor.shape:
            count *= side
        return {"data": count}
    return {
        before + section: size
        for before, (piece, one) in tensor.pieces(format).items()
        for section, size in one.bytes_of(*piece.shape).items()
    }


def record_layout(part: FeedForward, format: str = DEFAULT) -> ExpertLayout:
    """How one of the experts, or the dense feed-forward, lies in memory."""
    return ExpertLayout(part.hidden, part.width, split_formats(format, len(PROJECTIONS)))


def record_sections(part: FeedForward, format: str = DEFAULT) -> dict[str, int]:
    """Record -> bytes of one expert: its slices, one or two."""
    layout = record_layout(part, format)
    return {"msb": layout.msb_bytes} | ({"lsb": layout.lsb_bytes} if layout.lsb_bytes else {})


def shapes_digest(spec: ModelSpec) -> bytes:
    """8 bytes that tell whether two specs have the same tensors: sizes that share blocks and pages leave no trace in
    the sizes of a store's files."""
    lines = [f"{tensor.name} {tensor.kind} {list(tensor.shape)}" for tensor in tensors(spec)]
    lines += [f"{part.name} {part.kind} {[part.count, part.hidden, part.width]}" for part in feed_forwards(spec)]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest()


def store_bytes(spec: ModelSpec, formats: Formats) -> int:
    """Bytes of the data files of a store."""
    end, layers = PAGE, 0
    for tensor in tensors(spec):
        end = after_sections(end, tensor_sections(tensor, tensor.format(formats)))[1]
    for part in feed_forwards(spec):
        if part.kind != "expert":
            end = after_sections(end, record_sections(part, part.format(formats)))[1]
        else:
            layers += PAGE + part.count * sum(record_sections(part, part.format(formats)).values())
    return ceil_div(end, PAGE) * PAGE + layers


def after_sections(end: int, sections: dict[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of a tensor's sections in a file that ends at ``end``, and where it ends then."""
    offsets, end = {}, ceil_div(end, PAGE) * PAGE
    for section, size in sections.items():
        offsets[section] = end
        end = ceil_div(end + size, ALIGNMENT) * ALIGNMENT
    return offsets, end
