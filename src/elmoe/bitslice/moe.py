"""Router, expert FFN, embedding and vocabulary projection, in the canonical order.

The router is float32: logits by 16 lane sums, softmax over all experts, ties to the lowest id. A token's experts are
combined in ascending id from 0, then added to the residual stream.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.arithmetic import exp, lane_sum
from elmoe.bitslice.attention import rms_norm
from elmoe.bitslice.expert import ExpertLayout
from elmoe.bitslice.formats import Matrix, QuantizedMatrix, StackedMatrix, dequantized_rows, matmul
from elmoe.errors import NumericsError


@dataclass(frozen=True, eq=False)
class RouterWeights:
    """``norm`` (hidden,) of the FFN input and ``router`` (experts, hidden), float32; ``normalize``: scale the weights of
    the chosen experts to sum to one, which is a softmax over the chosen ones; ``ranked``: experts to rank, None is ``2 *
    top_k`` or fewer; ``bias`` (experts,): added to the logits; ``sigmoid``: scores are sigmoids of logits in place of their
    softmax; ``selection_bias`` (experts,): added to scores where experts are ranked and chosen, not in their weights;
    ``scaling``: factor of the weights. ``groups`` of experts that follow each other: those of the ``kept_groups`` best are
    ranked and chosen before all others; a group is worth its best expert, or with ``best_two`` the sum of its best two."""

    norm: NDArray[np.float32]
    router: NDArray[np.float32]
    epsilon: float
    top_k: int
    normalize: bool
    ranked: int | None = None
    bias: NDArray[np.float32] | None = None
    sigmoid: bool = False
    selection_bias: NDArray[np.float32] | None = None
    scaling: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    best_two: bool = False

    def __post_init__(self) -> None:
        # All else that is not finite is seen in what is computed of it; this bias in the choice alone.
        if self.selection_bias is not None and not np.isfinite(self.selection_bias).all():
            raise NumericsError("a bias of a router's choice is NaN or infinite", "check the checkpoint's weights")

    @property
    def ranks(self) -> int:
        """Experts ranked for each token."""
        return self.ranked or min(2 * self.top_k, self.router.shape[0])


@dataclass(frozen=True, eq=False)
class Routing:
    """What the router said of each token.

    ``hidden`` (tokens, hidden): the normed FFN input. ``ranked`` (tokens, ranks) int32: best experts, unmasked;
    ``scores``: their probabilities, or sigmoids. ``experts`` (tokens, k) int32: the experts to run, ascending;
    ``weights`` (tokens, k) float32.
    """

    hidden: NDArray[np.float32]
    ranked: NDArray[np.int32]
    scores: NDArray[np.float32]
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]


def ascending_sum(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum over the last axis as one chain from 0."""
    total = np.zeros(x.shape[:-1], np.float32)
    for i in range(x.shape[-1]):
        total = total + x[..., i]
    return total


def ranking(weights: RouterWeights, choice: NDArray[np.float32]) -> NDArray[np.intp]:
    """(tokens, experts) ids by ``choice`` descending, ties to the lowest id; those of kept groups are before all others."""
    order = np.argsort(-choice, axis=1, kind="stable")
    if weights.groups == 1:
        return order
    grouped = np.sort(choice.reshape(len(choice), weights.groups, -1), axis=2)
    worth = grouped[..., -1] + grouped[..., -2] if weights.best_two else grouped[..., -1]
    kept = np.zeros(worth.shape, bool)
    np.put_along_axis(kept, np.argsort(-worth, axis=1, kind="stable")[:, : weights.kept_groups], True, axis=1)
    behind = ~np.repeat(kept, grouped.shape[2], axis=1)
    return np.take_along_axis(order, np.argsort(np.take_along_axis(behind, order, axis=1), axis=1, kind="stable"), axis=1)


def route(
    weights: RouterWeights,
    x: NDArray[np.float32],
    allowed: NDArray[np.uint8] | None = None,
    draft_top_k: int | None = None,
    rescale: bool = True,
) -> Routing:
    """Norm the residual stream ``x`` (tokens, hidden), route it and choose experts.

    :param allowed: (experts,) nonzero where a draft may use an expert; None routes naturally. Scores always come from the
        softmax over all experts.
    :param draft_top_k: experts a draft runs per token, at most top_k; fewer where fewer are allowed.
    :param rescale: scale the draft's weights to the natural choice's final weight sum; otherwise keep them as they are
        (divided by the natural choice's sum where the family normalises).
    :raises NumericsError: no expert is allowed, or a router logit is not finite.
    """
    hidden = rms_norm(x, weights.norm, weights.epsilon)
    logits = lane_sum(hidden[:, None, :] * weights.router[None])
    if weights.bias is not None:
        logits = logits + weights.bias
    if not np.isfinite(logits).all():
        raise NumericsError("a router logit is NaN or infinite", "check the checkpoint's weights")
    if weights.sigmoid:
        probabilities = np.float32(1) / (np.float32(1) + exp(-logits))
    else:
        shifted = exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = shifted / lane_sum(shifted)[:, None]
    choice = probabilities if weights.selection_bias is None else probabilities + weights.selection_bias
    order = ranking(weights, choice)
    ranked = order[:, : weights.ranks].astype(np.int32)
    natural = np.sort(order[:, : weights.top_k], axis=1)
    natural_sum = ascending_sum(np.take_along_axis(probabilities, natural, axis=1))
    if allowed is None:
        experts = natural
    else:
        size = min(draft_top_k or weights.top_k, weights.top_k, int(np.count_nonzero(allowed)))
        if size == 0:
            raise NumericsError("a draft has no expert it may use")
        usable = order[allowed[order] != 0].reshape(len(order), -1)
        experts = np.sort(usable[:, :size], axis=1)
    chosen = np.take_along_axis(probabilities, experts, axis=1)
    if allowed is not None and rescale:
        target = np.ones_like(natural_sum) if weights.normalize else natural_sum
        chosen_sum = ascending_sum(chosen)
        # A draft whose experts all have probability 0 (underflow) shares the weight evenly.
        dead = (chosen_sum == 0)[:, None]
        factor = np.divide(target, chosen_sum, out=np.zeros_like(target), where=chosen_sum != 0)
        even = (target / np.float32(experts.shape[1]))[:, None]
        chosen = np.where(dead, even, chosen * factor[:, None])
    elif weights.normalize:
        chosen = chosen / natural_sum[:, None]
    if weights.scaling != 1:
        chosen = chosen * np.float32(weights.scaling)
    return Routing(hidden, ranked, np.take_along_axis(probabilities, ranked, axis=1), experts.astype(np.int32), chosen)


@dataclass(frozen=True, eq=False)
class ExpertTerms:
    """What experts compute beside their matrices. ``gate``, ``up`` (experts, width) and ``down`` (experts, hidden), float32:
    biases, added behind the chain of a product. ``alpha``, ``limit``: of the clamped SwiGLU in place of the plain one."""

    gate: NDArray[np.float32]
    up: NDArray[np.float32]
    down: NDArray[np.float32]
    alpha: float
    limit: float


def silu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """``x / (1 + exp(-x))``."""
    return x / (np.float32(1) + exp(-x))


def clamped_swiglu(gate: NDArray[np.float32], up: NDArray[np.float32], alpha: float, limit: float) -> NDArray[np.float32]:
    """GPT-OSS: with gate at most ``limit`` and up in ``-limit..limit``, ``gate / (1 + exp(-alpha * gate)) * (up + 1)``."""
    most, factor = np.float32(limit), np.float32(-alpha)
    gate, up = np.minimum(gate, most), np.maximum(np.minimum(up, most), -most)
    return gate / (np.float32(1) + exp(gate * factor)) * (up + np.float32(1))


def shared_weights(gate: NDArray[np.float32] | None, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights (tokens, 1) of a shared expert: 1, or the sigmoid of ``hidden`` times its gate (hidden,)."""
    if gate is None:
        return np.ones((len(hidden), 1), np.float32)
    return (np.float32(1) / (np.float32(1) + exp(-lane_sum(hidden * gate))))[:, None]


def expert_matrices(
    layout: ExpertLayout, addresses: NDArray[np.int64], expert: int, draft: bool
) -> dict[str, QuantizedMatrix]:
    """The matrices of an expert whose records lie at ``addresses[expert]`` = (msb, lsb)."""

    def record(slice_index: int, size: int) -> NDArray[np.uint8]:
        address = int(addresses[expert, slice_index])
        if address == 0:
            raise NumericsError(f"expert {expert}: the {('MSB', 'LSB')[slice_index]} slice is not resident")
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    lsb = None if draft or not layout.lsb_bytes else record(1, layout.lsb_bytes)
    return layout.unpack(record(0, layout.msb_bytes), lsb)


def expert_ffn(
    layout: ExpertLayout,
    addresses: NDArray[np.int64],
    hidden: NDArray[np.float32],
    experts: NDArray[np.int32],
    weights: NDArray[np.float32],
    x: NDArray[np.float32],
    draft: bool = False,
    offset: float = 8.0,
    chain: bool = False,
    terms: ExpertTerms | None = None,
) -> None:
    """Run SwiGLU experts on ``hidden`` (tokens, hidden) and add the weighted sum to the residual stream ``x`` in place.

    :param addresses: (experts, 2) int64, where each expert's MSB and LSB record lies in memory; 0 = not resident.
    :param experts: (tokens, k) int32 ascending expert ids, -1 where there is none; ``weights`` (tokens, k) float32.
    :param draft: read MSB slices only, with ``offset`` below them.
    :param chain: ``x`` is not the residual stream but the sum over lower expert ids so far, and is continued: so a layer can
        be computed in stretches of experts, as they arrive, with the same bits.
    :param terms: biases and another activation.
    :raises NumericsError: a slice that is needed is not resident.
    """
    total = x if chain else np.zeros_like(x)
    for expert in np.unique(experts[experts >= 0]):
        tokens, place = np.nonzero(experts == expert)
        matrices = expert_matrices(layout, addresses, int(expert), draft)
        inputs = hidden[tokens]
        gate = matmul(matrices["gate"], inputs, draft, offset=offset)
        up = matmul(matrices["up"], inputs, draft, offset=offset)
        if terms is None:
            inner = silu(gate) * up
        else:
            inner = clamped_swiglu(gate + terms.gate[expert], up + terms.up[expert], terms.alpha, terms.limit)
        down = matmul(matrices["down"], inner, draft, offset=offset)
        if terms is not None:
            down = down + terms.down[expert]
        total[tokens] = total[tokens] + weights[tokens, place][:, None] * down
    if not chain:
        x += total


def embed(matrix: Matrix, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Rows of the embedding, dequantised (exactly): (tokens, hidden) float32."""
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < matrix.rows):
        raise NumericsError(f"token id outside 0..{matrix.rows - 1}")
    if isinstance(matrix, StackedMatrix):
        raise NumericsError("an embedding has one format")
    return dequantized_rows(matrix, tokens)


def logits(norm: NDArray[np.float32], epsilon: float, head: Matrix, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Final norm and vocabulary projection: (tokens, hidden) -> (tokens, vocabulary) float32, checked finite."""
    result = matmul(head, rms_norm(x, norm, epsilon))
    if not np.isfinite(result).all():
        raise NumericsError("a logit is NaN or infinite", "check the checkpoint's weights")
    return result
