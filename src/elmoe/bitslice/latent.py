"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) in its absorbed form, in the canonical order.

A position's keys and values of all heads come from one latent. Here they are never made: the key projection of a head is
applied to its query (it is *absorbed*), scores and weighted sums are over latents, and the value projection of a head is
applied to its sum. That is attention of all heads to one key, the latent and behind it the rotary key that all heads share,
whose first part is the value too. Prompts and single tokens are computed alike, so no bit depends on how a text is cut.

Projections of heads are matmuls of their own rows: activations are quantised by head, chains are those of ``matmul``.
Scores, softmax and sums are those of ``attend``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.attention import KVCache, Places, attend, rms_norm, rotate
from elmoe.bitslice.formats import Matrix, QuantizedMatrix, matmul
from elmoe.errors import NumericsError


@dataclass(frozen=True, eq=False)
class LatentWeights:
    """Weights of one latent attention block. A head has ``plain_dim`` dimensions without and ``rotary_dim`` with rotary
    embedding, and ``value_dim`` of its value; ``rank`` of the latent is a multiple of 16, as ``value_dim``.

    ``query_latent``: rows of the queries (heads * (plain_dim + rotary_dim)), or of what ``query_up`` makes them of after
    ``query_norm``; then of the latent (rank); then of the rotary key (rotary_dim). ``key_up``: (heads * rank, plain_dim),
    the transposed key projection of each head; ``value_up``: (heads * value_dim, rank). ``output``: (hidden, heads *
    value_dim). ``epsilon`` of ``norm``, ``latent_epsilon`` of the other norms. ``scale``: of the scores.
    ``interleaved``: the rotary embedding pairs neighbours, otherwise halves.
    """

    norm: NDArray[np.float32]
    query_latent: Matrix
    query_norm: NDArray[np.float32] | None
    query_up: Matrix | None
    latent_norm: NDArray[np.float32]
    key_up: QuantizedMatrix
    value_up: QuantizedMatrix
    output: Matrix
    heads: int
    plain_dim: int
    rotary_dim: int
    epsilon: float
    latent_epsilon: float
    scale: float
    interleaved: bool

    @property
    def rank(self) -> int:
        """Dimensions of the latent."""
        return len(self.latent_norm)

    @property
    def value_dim(self) -> int:
        """Dimensions of a head's value."""
        return self.value_up.rows // self.heads


def rotate_neighbours(x: NDArray[np.float32], cosine: NDArray[np.float32], sine: NDArray[np.float32]) -> NDArray[np.float32]:
    """As ``rotate``, of dimensions (2i, 2i + 1) in place of halves; all dimensions are rotated."""
    first, second = x[..., 0::2], x[..., 1::2]
    cosine, sine = cosine[:, None, :], sine[:, None, :]
    return np.stack([first * cosine - second * sine, second * cosine + first * sine], axis=-1).reshape(x.shape)


def by_head(matrix: QuantizedMatrix, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each head's rows of a matrix times its own vectors: (tokens, heads, columns) -> (tokens, heads, rows / heads)."""
    heads = x.shape[1]
    rows = matrix.rows // heads
    return np.stack(
        [matmul(matrix.row_blocks(h * rows, (h + 1) * rows), np.ascontiguousarray(x[:, h])) for h in range(heads)], axis=1
    )


def latent_block(
    weights: LatentWeights, x: NDArray[np.float32], cache: KVCache, layer: int, places: Places, cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
) -> None:  # fmt: skip
    """Add latent attention to the residual stream ``x`` (tokens, hidden) in place and write latents to the cache; otherwise
    as ``attention_block``.

    :raises NumericsError: a latent or rotary key is not finite in fp16. :raises ValueError: places contradict each other.
    """
    tokens, slots, positions = x.shape[0], places.slots, places.positions
    seen, cells = (None, positions) if places.chain or places.cells is None else (places.seen(), places.cells)
    heads, rank, plain = weights.heads, weights.rank, weights.plain_dim
    projected = matmul(weights.query_latent, rms_norm(x, weights.norm, weights.epsilon))
    query_rows = weights.query_latent.rows - rank - weights.rotary_dim
    query, latent, key = np.split(projected, [query_rows, query_rows + rank], axis=1)
    if weights.query_up is not None and weights.query_norm is not None:
        query = matmul(weights.query_up, rms_norm(query, weights.query_norm, weights.latent_epsilon))
    query = query.reshape(tokens, heads, -1)
    turn = rotate_neighbours if weights.interleaved else rotate
    tables = cosine[positions], sine[positions]
    rows = np.concatenate(
        [rms_norm(latent, weights.latent_norm, weights.latent_epsilon), turn(key[:, None], *tables)[:, 0]], axis=1
    )
    with np.errstate(over="ignore"):
        cached = rows.astype(np.float16)
    if not np.isfinite(cached).all():
        raise NumericsError(f"layer {layer}: a latent or rotary key is not finite in fp16")
    for token in range(tokens):
        nothing = np.empty((1, 0), np.float16)
        cache.write(layer, int(slots[token]), int(cells[token]), nothing, cached[token, None])
    absorbed = by_head(weights.key_up, query[..., :plain])
    query = np.concatenate([absorbed, turn(query[..., plain:], *tables)], axis=2)
    attended = np.empty((tokens, heads, rank), np.float32)
    for token in range(tokens):
        length = int(positions[token]) + 1
        if seen is None:
            _, rows16 = cache.gather(layer, int(slots[token]), length)
        else:
            rows16 = cache.gather(layer, int(slots[token]), max(seen[token]) + 1)[1][:, seen[token]]
        attended[token] = attend(query[token], rows16, rows16[:, :, :rank], scale=np.float32(weights.scale))
    x += matmul(weights.output, by_head(weights.value_up, attended).reshape(tokens, -1))
