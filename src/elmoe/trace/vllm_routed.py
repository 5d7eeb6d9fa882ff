"""Routing facts from what vLLM returns with ``--enable-return-routed-experts``: expert ids (tokens, layers, top_k).

Per vLLM's documentation a response has ``prompt_routed_experts`` for the tokens of the prompt, and each of its completions
``routed_experts`` for the tokens generated. Taken are

- ``.npy``: one sequence; how many of its tokens are the prompt's is said beside it,
- ``.npz``: ``prompt_routed_experts`` and ``routed_experts``, of one sequence, or of several with the same ending, such as
  ``prompt_routed_experts_0`` and ``routed_experts_0``; a prompt's array may be missing,
- ``.json`` or ``.jsonl``: a response of the server a line, the arrays as nested lists; each completion is a sequence.

Layers without experts are in some versions, with the same id in all places: they are left out. Rows at the end that are
negative are tokens without routing: they are left out too.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.trace.facts import MAX_EXPERTS, MAX_IDS, RoutingFacts
from elmoe.untrusted import short

PROMPT, GENERATED = "prompt_routed_experts", "routed_experts"
LINE_LIMIT = 256 << 20
"""Bytes of one response."""
DAMAGED = (
    OSError, ValueError, EOFError, MemoryError, SyntaxError, TokenError, RuntimeError, zipfile.BadZipFile, zlib.error
)  # fmt: skip
"""What NumPy and ``zipfile`` raise of a damaged file: MemoryError where a header tells of more values than there are."""
Pair = tuple[NDArray[np.integer] | None, NDArray[np.integer]]
"""Ids of a prompt, if they are known, and of what was generated."""


def import_vllm_routed(path: str | Path, experts: int, prompt_tokens: int | None = None) -> RoutingFacts:
    """The sequences of a file; ranks are the top-k, best first.

    :param experts: of a layer, which the arrays do not say. :param prompt_tokens: of a ``.npy`` file, at least 1.
    :raises TraceError: the file is none of these, or its arrays do not fit one another.
    """
    path = Path(path)
    readers = {".npy": _npy, ".npz": _npz, ".json": _responses, ".jsonl": _responses}
    if path.suffix not in readers:
        raise TraceError(f"'{short(path)}' is none of {', '.join(readers)}", "save vLLM's arrays with numpy.save or savez")
    if (prompt_tokens is not None) != (path.suffix == ".npy"):
        raise TraceError("the number of prompt tokens is for a .npy file, which needs it")
    if not 1 <= experts <= MAX_EXPERTS:
        raise TraceError(f"{experts} experts cannot be", f"allowed are 1 to {MAX_EXPERTS}")
    try:
        pairs = [_checked(f"'{short(path)}', {name}", pair, experts) for name, pair in readers[path.suffix](path)]
    except DAMAGED as error:
        raise TraceError(f"cannot read '{short(path)}': {short(error)}", "is it whole?") from error
    if not pairs:
        raise TraceError(f"'{short(path)}' holds no {GENERATED}", "start vLLM with --enable-return-routed-experts")
    return _facts(path, pairs, experts, prompt_tokens)


def _facts(path: Path, pairs: list[Pair], experts: int, prompt_tokens: int | None) -> RoutingFacts:
    whole = [one if before is None else np.concatenate((before, one)) for before, one in pairs]
    if len({one.shape[1:] for one in whole}) > 1:
        shapes = ", ".join(str(shape) for shape in sorted({one.shape[1:] for one in whole}))
        raise TraceError(f"'{short(path)}': sequences have different layers and top-k: {shapes}", "one model per file")
    lengths = np.array([len(one) for one in whole], np.int32)
    if prompt_tokens is not None and not 1 <= prompt_tokens <= lengths[0] + 1:
        raise TraceError(f"'{short(path)}' holds {lengths[0]} tokens, {prompt_tokens} of a prompt cannot be")
    layers, top_k = whole[0].shape[1:]
    if len(whole) * int(lengths.max()) * layers * top_k > MAX_IDS:
        raise TraceError(f"'{short(path)}' holds more than {MAX_IDS} expert ids", "use fewer or shorter sequences")
    routed = [index for index in range(layers) if any((one[:, index] != one[:, index, :1]).any() for one in whole)]
    if top_k == 1:
        routed = list(range(layers))
    if not routed:
        raise TraceError(f"'{short(path)}': every layer has the same expert in all places: no routing was recorded")
    ranked = np.zeros((len(whole), int(lengths.max()), len(routed), top_k), np.uint16)
    for sequence, one in enumerate(whole):
        ranked[sequence, : len(one)] = one[:, routed]
    # The last token of a prompt is the first that decoding computes; without its routing the first step is a later one.
    prompts = [1 if before is None else len(before) for before, _ in pairs]
    source = f"imported: vLLM, {len(routed)} layers, top {top_k} of {experts}; {path.name}"
    if len(routed) < layers:
        source += f"; {layers - len(routed)} layers without experts left out"
    counts = np.array(prompts if prompt_tokens is None else [prompt_tokens], np.int32)
    return RoutingFacts(ranked, counts, lengths, experts, int(top_k), source)


def _checked(name: str, pair: Pair, experts: int) -> Pair:
    """The pair with whole numbers (tokens, layers, top_k) in range; rows without routing at the end are cut."""
    before, generated = (None if one is None else _array(name, one) for one in pair)
    assert generated is not None
    known = np.flatnonzero((generated >= 0).any(axis=(1, 2)))
    generated = generated[: known[-1] + 1 if len(known) else 0]
    if before is not None and before.shape[1:] != generated.shape[1:]:
        raise TraceError(f"{name}: the prompt has layers and top-k {before.shape[1:]}, the rest {generated.shape[1:]}")
    for one in (before, generated):
        if one is not None and one.size and not 0 <= one.min() <= one.max() < experts:
            wrong = int(one.min() if one.min() < 0 else one.max())
            hint = "a negative id is a token without routing" if wrong < 0 else "give the number of experts of a layer"
            raise TraceError(f"{name}: expert {wrong} is named, the model has {experts}", hint)
    if not len(generated) or (before is not None and not len(before)):
        raise TraceError(f"{name}: there is no token")
    return before, generated


def _array(name: str, value: Any) -> NDArray[np.integer]:
    found = np.asarray(value)
    if found.ndim != 3 or found.dtype.kind not in "iu" or 0 in found.shape[1:]:
        raise TraceError(f"{name}: {found.dtype} {found.shape}, not whole numbers (tokens, layers, top_k)")
    if found.size > MAX_IDS:
        raise TraceError(f"{name}: more than {MAX_IDS} expert ids", "use fewer or shorter sequences")
    return found


def _npy(path: Path) -> Iterator[tuple[str, Pair]]:
    yield "the array", (None, np.load(path, mmap_mode="r", allow_pickle=False))  # mapped: its header is checked by its size


def _npz(path: Path) -> Iterator[tuple[str, Pair]]:
    with zipfile.ZipFile(path) as archive:
        if sum(one.file_size for one in archive.infolist()) > 8 * MAX_IDS:
            raise TraceError(f"'{short(path)}' holds more than {8 * MAX_IDS} bytes", "use fewer or shorter sequences")
    with np.load(path, allow_pickle=False) as arrays:
        endings = [name.removeprefix(GENERATED) for name in arrays.files if name.startswith(GENERATED)]
        alone = {name.removeprefix(PROMPT) for name in arrays.files if name.startswith(PROMPT)} - set(endings)
        if alone:
            name = PROMPT + min(alone)
            raise TraceError(f"'{short(path)}': {short(name)} has no {GENERATED} of the same ending", "name both alike")
        for ending in sorted(endings, key=lambda ending: (len(ending), ending)):
            before = arrays[PROMPT + ending] if PROMPT + ending in arrays.files else None
            yield GENERATED + ending, (before, arrays[GENERATED + ending])


def _responses(path: Path) -> Iterator[tuple[str, Pair]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            if len(line) > LINE_LIMIT:
                raise TraceError(f"'{short(path)}', line {number} has more than {LINE_LIMIT} bytes", "one response a line")
            if line.strip():
                yield from ((f"line {number}", pair) for pair in _response(f"'{short(path)}', line {number}", line))


def _response(name: str, line: bytes) -> Iterator[Pair]:
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"{name}: not JSON: {short(error)}", "one response a line") from error
    if not isinstance(found, dict):
        raise TraceError(f"{name} is no object", "one response a line")
    choices = found.get("choices")
    for one in choices if isinstance(choices, list) else [found]:
        if not isinstance(one, dict) or one.get(GENERATED) is None:
            raise TraceError(f"{name} has no {GENERATED}", "start vLLM with --enable-return-routed-experts")
        before = found.get(PROMPT) if found.get(PROMPT) is not None else one.get(PROMPT)
        yield (None if before is None else _nested(name, before)), _nested(name, one[GENERATED])


def _nested(name: str, value: Any) -> NDArray[np.integer]:
    try:
        ids = msgspec.convert(value, list[list[list[int]]])  # which NumPy would not say of true and false
    except msgspec.ValidationError as error:
        told = f"{name}: not whole numbers (tokens, layers, top_k): {short(error)}"
        raise TraceError(told, "each token has all layers, each layer top_k ids") from None
    try:
        found = np.array(ids)
    except (ValueError, OverflowError):
        raise TraceError(f"{name}: lists of different lengths", "each token has all layers, each layer top_k ids") from None
    return _array(name, found)
