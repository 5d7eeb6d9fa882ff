"""Types of the compiled module; ``elmoe.kernels`` is its only importer."""

from collections.abc import Callable
from typing import overload

import numpy as np
from numpy.typing import NDArray

class NumericsFailure(Exception): ...

class Matrix:
    @overload
    def __init__(
        self, rows: int, columns: int, hi: NDArray[np.uint8], lo: NDArray[np.uint8] | None, scales: NDArray[np.uint16]
    ) -> None: ...
    @overload
    def __init__(
        self,
        rows: int,
        columns: int,
        format: str,
        hi: NDArray[np.uint8],
        lo: NDArray[np.uint8] | None,
        scales: NDArray[np.uint16] | None,
        minima: NDArray[np.uint16] | None,
        steps: NDArray[np.uint8] | None,
    ) -> None: ...

class Attention:
    def __init__(
        self,
        norm: NDArray[np.float32],
        query_key_value: Matrix | list[Matrix],
        query_norm: NDArray[np.float32] | None,
        key_norm: NDArray[np.float32] | None,
        output: Matrix,
        heads: int,
        kv_heads: int,
        head_dim: int,
        epsilon: float,
        projection_bias: NDArray[np.float32] | None,
        output_bias: NDArray[np.float32] | None,
        sinks: NDArray[np.float32] | None,
        window: int,
        scale: float | None,
    ) -> None: ...

class Latent:
    def __init__(
        self,
        norm: NDArray[np.float32],
        query_latent: Matrix | list[Matrix],
        query_norm: NDArray[np.float32] | None,
        query_up: Matrix | None,
        latent_norm: NDArray[np.float32],
        key_up: Matrix,
        value_up: Matrix,
        output: Matrix,
        heads: int,
        plain_dim: int,
        rotary_dim: int,
        epsilon: float,
        latent_epsilon: float,
        scale: float,
        interleaved: bool,
    ) -> None: ...

class Router:
    def __init__(
        self,
        norm: NDArray[np.float32],
        router: NDArray[np.float32],
        top_k: int,
        epsilon: float,
        normalize: bool,
        bias: NDArray[np.float32] | None,
        sigmoid: bool,
        selection_bias: NDArray[np.float32] | None,
        scaling: float,
        groups: int,
        kept_groups: int,
        best_two: bool,
    ) -> None: ...

class Cache:
    def __init__(
        self,
        keys: NDArray[np.uint16],
        values: NDArray[np.uint16],
        table: NDArray[np.int32],
        places: NDArray[np.int32] | None,
    ) -> None: ...

class Terms:
    def __init__(
        self, gate: NDArray[np.float32], up: NDArray[np.float32], down: NDArray[np.float32], alpha: float, limit: float
    ) -> None: ...

class Expert:
    @overload
    def __init__(self, hidden: int, width: int, msb: list[int], lsb: list[int], msb_bytes: int, lsb_bytes: int) -> None: ...
    @overload
    def __init__(
        self, hidden: int, width: int, formats: list[str], offsets: list[list[int]], msb_bytes: int, lsb_bytes: int
    ) -> None: ...

class Norm:
    def __init__(self, norm: NDArray[np.float32], epsilon: float) -> None: ...

class Shared:
    def __init__(self, expert: Expert, addresses: NDArray[np.int64], gate: NDArray[np.float32] | None) -> None: ...

class Layer:
    def __init__(
        self,
        attention: Attention | Latent,
        router: Router | None,
        norm: Norm | None,
        expert: Expert,
        addresses: NDArray[np.int64],
        terms: Terms | None,
        shared: Shared | None,
    ) -> None: ...

class Stack:
    def __init__(self, layers: list[Layer]) -> None: ...

def forward(
    stack: Stack,
    x: NDArray[np.float32],
    cache: Cache,
    slots: NDArray[np.int32],
    positions: NDArray[np.int32],
    cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
    allowed: NDArray[np.uint8] | None,
    rescale: bool,
    coarse: bool,
    offset: float,
    ranked: NDArray[np.int32],
    scores: NDArray[np.float32],
    experts: NDArray[np.int32],
    weights: NDArray[np.float32],
    slices: ExpertSlices | None,
    ready: Callable[[], list[int]] | None,
    routed: Callable[[int], None] | None,
    times: NDArray[np.float64] | None,
) -> None: ...
def nested_matmul(matrix: Matrix, x: NDArray[np.float32], y: NDArray[np.float32], draft: bool, offset: float) -> None: ...
def rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], y: NDArray[np.float32], epsilon: float) -> None: ...
def attention_block(
    weights: Attention,
    x: NDArray[np.float32],
    cache: Cache,
    layer: int,
    slots: NDArray[np.int32],
    positions: NDArray[np.int32],
    cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
) -> None: ...
def latent_block(
    weights: Latent,
    x: NDArray[np.float32],
    cache: Cache,
    layer: int,
    slots: NDArray[np.int32],
    positions: NDArray[np.int32],
    cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
) -> None: ...
def route(
    router: Router,
    x: NDArray[np.float32],
    allowed: NDArray[np.uint8] | None,
    rescale: bool,
    hidden: NDArray[np.float32],
    ranked: NDArray[np.int32],
    scores: NDArray[np.float32],
    experts: NDArray[np.int32],
    weights: NDArray[np.float32],
) -> None: ...
def expert_ffn(
    layout: Expert,
    addresses: NDArray[np.int64],
    hidden: NDArray[np.float32],
    experts: NDArray[np.int32],
    weights: NDArray[np.float32],
    x: NDArray[np.float32],
    draft: bool,
    offset: float,
    chain: bool,
    terms: Terms | None,
) -> None: ...
def embed(matrix: Matrix, tokens: NDArray[np.int32], out: NDArray[np.float32]) -> None: ...
def logits(
    norm: NDArray[np.float32], epsilon: float, head: Matrix, x: NDArray[np.float32], out: NDArray[np.float32]
) -> None: ...
def sample(
    logits: NDArray[np.float32],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    choice: int,
    position: int,
    adjusted: NDArray[np.float32] | None,
) -> tuple[int, float, float]: ...
def pack_pairs(rows: NDArray[np.uint8], block_bytes: int, offset: int, plane: NDArray[np.uint8]) -> None: ...
def split_codes(
    rows: NDArray[np.uint8], block_bytes: int, offset: int, flip: int, low: NDArray[np.uint8], high: NDArray[np.uint8]
) -> None: ...
def split_groups(rows: NDArray[np.uint8], block_bytes: int, offset: int, plane: NDArray[np.uint8]) -> None: ...
def group_maxima(weights: NDArray[np.float32], maxima: NDArray[np.float32]) -> None: ...
def quantize_planes(
    weights: NDArray[np.float32], scales: NDArray[np.float32], low: NDArray[np.uint8], high: NDArray[np.uint8]
) -> None: ...

class ReadPool:
    """Asynchronous reads; see native/read_pool.hpp."""

    def __init__(self, threads: int) -> None: ...
    def submit(
        self,
        files: list[int],
        offsets: list[int],
        sizes: list[int],
        destinations: list[int],
        priority: int,
    ) -> list[int]: ...
    def wait(self, tickets: list[int]) -> list[tuple[int, int]]: ...
    def done(self, ticket: int) -> bool: ...
    def hasten(self, tickets: list[int], priority: int) -> None: ...
    def set_bandwidth(self, bytes_per_second: float) -> None: ...
    def inject_failure(self, error: int, after: int) -> None: ...
    def inject_delay(self, seconds: float, seed: int) -> None: ...
    def record(self, on: bool) -> None: ...
    def take_events(self) -> list[tuple[float, float, float, int, int]]: ...
    def bytes_read(self) -> int: ...
    def busy_seconds(self) -> float: ...

def refill(
    msb: NDArray[np.bool_],
    lsb: NDArray[np.bool_],
    hotness: NDArray[np.float64],
    streamed: NDArray[np.bool_],
    msb_slots: int,
    lsb_slots: int,
    hysteresis: float,
    swap_cap: int,
) -> None: ...

class SliceReadFailure(RuntimeError): ...

class ExpertArena:
    """Slots of several kinds, each with its size and a limit; see native/expert_slices.hpp."""

    def __init__(self, bytes: list[int], slots: list[int]) -> None: ...
    @property
    def capacity(self) -> int: ...
    @property
    def used(self) -> int: ...
    def size(self, kind: int) -> int: ...
    def has_room(self, kind: int, reserve: int = 0) -> bool: ...
    def take(self, kind: int) -> int: ...
    def give(self, kind: int, slot: int) -> None: ...
    def move(self, kind: int, source: int, target: int) -> None: ...
    def resize(self, kind: int, slots: int) -> None: ...
    def address(self, kind: int, slot: int) -> int: ...

class ExpertSlices:
    """Where every slice lies and which stretch of a layer can be computed next; see native/expert_slices.hpp."""

    def __init__(
        self,
        pool: ReadPool,
        sizes: list[tuple[int, int]],
        classes: list[int],
        names: list[str],
        files: list[int],
        offsets: list[list[int]],
        addresses: list[NDArray[np.int64]],
        reserve: int,
    ) -> None: ...
    @property
    def arena(self) -> ExpertArena: ...
    @property
    def waited(self) -> float: ...
    @property
    def reads(self) -> int: ...
    @property
    def foreseen_hits(self) -> int: ...
    def resize(self, slots: list[tuple[int, int]]) -> None: ...
    def foresee(self, row: int, ranked: NDArray[np.int32], top_k: int) -> None: ...
    def begin(self, row: int, experts: NDArray[np.int32]) -> None: ...
    def begin_and_refill(
        self,
        row: int,
        experts: NDArray[np.int32],
        msb: NDArray[np.bool_],
        lsb: NDArray[np.bool_],
        scores: NDArray[np.float64],
        msb_slots: int,
        lsb_slots: int,
        hysteresis: float,
        swap_cap: int,
    ) -> None: ...
    def keep(self, row: int, msb: NDArray[np.bool_], lsb: NDArray[np.bool_]) -> None: ...
    def next(self) -> list[int]: ...
    def forget_plans(self) -> None: ...
    def abandon(self) -> None: ...
    def finish(self) -> None: ...
    def record(self, on: bool) -> None: ...
    def take_waits(self) -> list[tuple[int, float, float]]: ...

def stream_read(data: NDArray[np.uint8]) -> int: ...
def set_threads(count: int) -> None: ...
def threads() -> int: ...
def set_prefetch(bytes: int) -> None: ...
def prefetch() -> int: ...
def set_variant(name: str) -> bool: ...
def variant() -> str: ...
def variants() -> list[str]: ...
