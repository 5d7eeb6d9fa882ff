"""How often each expert of a model is chosen, as others have published it: what a synthesiser can be told to reproduce.

Only frequencies: none of these sources says which token follows which.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.trace.facts import MAX_EXPERTS
from elmoe.trace.locality import read_json, write_json
from elmoe.untrusted import decode_json, load_object

POPULARITY_VERSION = 1
SOURCE_LIMIT = 16 << 20
"""Bytes of a file that is imported, or of a popularity."""
MAX_LAYERS = 4096
ORDER_SPREAD = 0.12
"""Standard deviation of log-frequencies where only an order is known: Mixtral's in allenai/OLMoE's counts."""


class Popularity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Frequencies by domain: ``domains[name][row][expert]`` sums to 1 in each row; ``layers``: the model layer of each row.

    ``status``: ``measured``, or ``assumed`` where only the order was.

    :raises TraceError: the numbers do not form such tables.
    """

    model: str
    source: str
    status: Literal["measured", "assumed"]
    layers: tuple[int, ...]
    domains: dict[str, tuple[tuple[float, ...], ...]]
    version: int = POPULARITY_VERSION

    def __post_init__(self) -> None:
        if not self.layers or not self.domains or len(self.layers) > MAX_LAYERS:
            raise TraceError(f"a popularity has 1..{MAX_LAYERS} layers and at least one domain")
        if self.layers[0] < 0 or any(a >= b for a, b in pairwise(self.layers)):
            raise TraceError("layers must ascend")
        experts = {len(row) for rows in self.domains.values() for row in rows}
        for name, rows in self.domains.items():
            if len(rows) != len(self.layers) or len(experts) != 1:
                raise TraceError(f"domain {name}: not {len(self.layers)} layers of as many experts as elsewhere")
            for layer, row in zip(self.layers, rows, strict=True):
                if not all(0 <= value <= 1 for value in row) or abs(sum(row) - 1) > 1e-3:
                    raise TraceError(f"domain {name}, layer {layer}: not frequencies that sum to 1")

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return len(next(iter(self.domains.values()))[0])

    def table(self, layers: int, domain: str | None = None) -> NDArray[np.float64]:
        """(layers, experts) frequencies of a domain, None for the mean of all; of more or fewer layers than are known, each
        takes the row at the nearest relative depth.

        :raises TraceError: there is no such domain.
        """
        if domain is not None and domain not in self.domains:
            raise TraceError(f"the popularity has no domain '{domain}'", f"take one of {', '.join(self.domains)}")
        rows = np.mean([self.domains[name] for name in ([domain] if domain else self.domains)], axis=0)
        depth = np.linspace(0, len(rows) - 1, layers) if layers > 1 else np.zeros(1)
        return rows[np.rint(depth).astype(int)]


def save_popularity(popularity: Popularity, path: str | Path) -> None:
    """Write JSON, one line per layer; TraceError if it cannot be written."""
    write_json(path, msgspec.json.encode(popularity).replace(b",[", b",\n[").replace(b'],"', b'],\n"'))


def load_popularity(path: str | Path) -> Popularity:
    """A file of ``elmoe trace import``; TraceError if it is none."""
    raw = _read(path)
    popularity = decode_json(raw, str(path), Popularity, TraceError, "no popularity", "write it with `elmoe trace import`")
    if not 1 <= popularity.version <= POPULARITY_VERSION:
        raise TraceError(f"'{path}' has version {popularity.version}, this elmoe reads {POPULARITY_VERSION}", "update elmoe")
    return popularity


def import_popularity(path: str | Path, kind: Literal["esft", "olmoe", "fiddler"], model: str | None = None) -> Popularity:
    """Published statistics as a popularity.

    ``esft``: expert scores of deepseek-ai/ESFT, a file per task or a folder of them. ``olmoe``: expert counts of
    allenai/OLMoE as ``{"layers": [...], "models": {model: {"expert_counts": {domain: [[count, ...], ...]}}}}``. ``fiddler``:
    the order of efeslab/fiddler, ``{"order": [[layer, expert], ...]}``, most popular first; frequencies are assumed to be
    log-normal.

    :param model: which model of the file, where it holds several.
    :raises TraceError: naming the file, the place in it and the mend.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path, str | None], Popularity]] = {"esft": _esft, "olmoe": _olmoe, "fiddler": _fiddler}
    return readers[kind](path, model)


def _esft(path: Path, model: str | None) -> Popularity:
    files = sorted(path.glob("*scores*.json")) if os.path.isdir(path) else [path]
    if not files:
        raise TraceError(f"'{path}' holds no *scores*.json", "give the folder of ESFT's expert scores, or one of the files")
    domains: dict[str, tuple[tuple[float, ...], ...]] = {}
    layers: tuple[int, ...] = ()
    for file in files:
        scores = _member(file, _json(file), "token_scores", dict)
        numbers = tuple(sorted(_index(file, f"token_scores.{key}", key) for key in scores))
        if layers and numbers != layers:
            raise TraceError(f"'{file}': its layers are not those of the other files", "import one model at a time")
        layers = numbers
        rows = []
        for layer in layers:
            place = f"token_scores.{layer}"
            row = _member(file, scores, str(layer), dict)
            if sorted(_index(file, f"{place}.{key}", key) for key in row) != list(range(len(row))):
                raise TraceError(f"'{file}', {place}: experts are not 0..{len(row) - 1}", "an expert is missing or doubled")
            rows.append(_frequencies(file, place, [row.get(str(expert)) for expert in range(len(row))]))
        domains[file.stem.rsplit("_", 1)[-1]] = tuple(rows)
    return _checked(path, model or "DeepSeek-V2-Lite", "measured", layers, domains, "token scores of deepseek-ai/ESFT")


def _olmoe(path: Path, model: str | None) -> Popularity:
    data = _json(path)
    models = _member(path, data, "models", dict)
    model = model or ("olmoe" if "olmoe" in models else next(iter(models), ""))
    if model not in models:
        raise TraceError(f"'{path}' has no model '{model}'", f"take one of {', '.join(models)}")
    layers = tuple(_index(path, "layers", layer) for layer in _member(path, data, "layers", list))
    counts = _member(path, _member(path, models, model, dict), "expert_counts", dict)
    domains = {}
    for domain, rows in counts.items():
        place = f"models.{model}.expert_counts.{domain}"
        if not isinstance(rows, list) or len(rows) != len(layers):
            raise TraceError(f"'{path}', {place}: not a list for each of {len(layers)} layers")
        domains[domain] = tuple(_frequencies(path, f"{place}[{index}]", row) for index, row in enumerate(rows))
    return _checked(path, model, "measured", layers, domains, "expert counts of allenai/OLMoE")


def _fiddler(path: Path, model: str | None) -> Popularity:
    data = _json(path)
    order = _member(path, data, "order", list)
    place: dict[tuple[int, int], int] = {}
    for index, pair in enumerate(order):
        where = f"order[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise TraceError(f"'{path}', {where}: not a pair of layer and expert")
        layer, expert = _index(path, where, pair[0]), _index(path, where, pair[1])
        if (layer, expert) in place:
            raise TraceError(f"'{path}', {where}: layer {layer}, expert {expert} is there twice", "remove one of them")
        place[layer, expert] = index
    layers = 1 + max((layer for layer, _ in place), default=0)
    experts = 1 + max((expert for _, expert in place), default=0)
    if not place or layers > MAX_LAYERS or experts > MAX_EXPERTS or layers * experts != len(place):
        raise TraceError(
            f"'{path}', order: {len(place)} pairs are not all of {layers} layers x {experts} experts", "complete the order"
        )
    normal = NormalDist()
    rows = []
    for layer in range(layers):
        ranks = [place[layer, expert] for expert in range(experts)]
        weights = [math.exp(-ORDER_SPREAD * normal.inv_cdf((rank + 0.5) / len(place))) for rank in ranks]
        rows.append(_frequencies(path, f"layer {layer}", weights))
    name = model or (data["model"] if isinstance(data.get("model"), str) else "Mixtral-8x7B")
    note = f"order of efeslab/fiddler; magnitudes assumed log-normal, sigma {ORDER_SPREAD}"
    return _checked(path, name, "assumed", tuple(range(layers)), {"all": tuple(rows)}, note)


def _checked(
    path: Path, model: str, status: Literal["measured", "assumed"], layers: tuple[int, ...],
    domains: dict[str, tuple[tuple[float, ...], ...]], source: str,
) -> Popularity:  # fmt: skip
    try:
        return Popularity(model=model, source=source, status=status, layers=layers, domains=domains)
    except TraceError as error:
        raise TraceError(f"'{path}': {error}", error.hint) from error


def _frequencies(path: Path, place: str, values: Any) -> tuple[float, ...]:
    """Counts or scores scaled to sum to 1, of six digits."""
    known = isinstance(values, list) and 0 < len(values) <= MAX_EXPERTS
    if not known or not all(type(value) in (int, float) and 0 <= value < 1e18 for value in values) or not sum(values):
        raise TraceError(f"'{path}', {place}: not a list of numbers of 0 or more, one per expert, that are not all 0")
    total = sum(values)
    return tuple(round(value / total, 6) for value in values)


def _index(path: Path, place: str, value: Any) -> int:
    """A small whole number, or its decimal text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 8:
        value = int(value)
    if type(value) is not int or not 0 <= value < MAX_EXPERTS:
        raise TraceError(f"'{path}', {place}: {value!r} is no layer or expert number")
    return value


def _member(path: Path, data: dict[str, Any], key: str, kind: type) -> Any:
    value = data.get(key)
    if not isinstance(value, kind):
        found = ", ".join(list(data)[:8])
        raise TraceError(f"'{path}' lacks {key} ({kind.__name__})", f"it holds {found}: is it of another kind?")
    return value


def _json(path: Path) -> dict[str, Any]:
    return load_object(_read(path), str(path), TraceError)


def _read(path: str | Path) -> bytes:
    _, raw = read_json(Path(path), Path("no presets"), "popularity", "give the file's path", SOURCE_LIMIT)
    return raw
