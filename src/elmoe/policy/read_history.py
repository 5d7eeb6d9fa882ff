"""What target passes of every draft length would have read, told from the routing of those that ran.

A pass that verifies a draft shows what shorter drafts would have touched, and passes behind it what longer ones would have:
so all lengths, plain decoding among them, are measured on the same text and the same residents, whichever of them ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.residency import ResidentSet

DECAY = 0.95
"""Decay of the measured bytes per pass."""
PRIOR = 2.0
"""Weight of the modelled bytes, in passes."""
MOST_WAITING = 256
"""Passes that wait at most: where choices are rare, memory and the time of the next one stay bounded."""
LONGEST = 6
"""Longest draft whose reads are measured. Those of longer ones stand to their model as those of this one."""

_Waiting = tuple[dict[int, int], NDArray[np.int32], ResidentSet, NDArray[np.float64] | None, tuple[float, float]]
_Pass = tuple[list[int], NDArray[np.uint8], NDArray[np.float64]]
"""Each sequence's first token in a pass, bits of the slices found resident by kind and layer, and modelled bytes by draft
length."""


class ReadHistory:
    """Measured over modelled bytes of target passes, by draft length.

    :param lengths: draft lengths, ascending. :param msb, lsb: bytes of a slice in each layer.
    """

    def __init__(self, lengths: Sequence[int], msb: Sequence[int], lsb: Sequence[int]) -> None:
        self._bytes = np.array([msb, lsb], np.int64)
        self._lengths = np.array([length for length in lengths if length <= max(LONGEST, lengths[0])])
        self._horizon = int(self._lengths[-1]) + 1
        self._waiting: list[_Waiting] = []  # passes not looked at yet: many at once take less time than one by one
        self._measured, self._modelled = np.zeros(len(lengths)), np.zeros(len(lengths))
        self._begin(())

    def end_run(self) -> None:
        """Sequences of the next run may be numbered as these, but do not continue them."""
        self._look()
        self._learn()
        self._begin(())

    def _begin(self, sequences: tuple[int, ...]) -> None:
        self._sequences = sequences
        self._touched: list[NDArray[np.uint8]] = []  # bits of the experts that a committed token touched, by layer
        self._tokens: list[list[int]] = [[] for _ in sequences]  # of each sequence, among those touched
        self._passes: list[_Pass] = []

    def observe(
        self, sequences: dict[int, int], experts: NDArray[np.int32], found: ResidentSet,
        modelled: NDArray[np.float64] | None, settled: tuple[float, float] = (0.0, 0.0),
    ) -> None:  # fmt: skip
        """Remember a target pass; cheap.

        :param sequences: how many tokens each committed. :param experts: (layers, tokens, k) of those tokens, sequence by
            sequence. :param found: resident when the pass began. :param modelled: bytes by draft length, None where they say
            nothing. :param settled: (MSB, LSB) slices that must be resident, or its bytes tell of slices just changed.
        """
        self._waiting.append((sequences, experts, found, modelled, settled))
        if len(self._waiting) >= MOST_WAITING:
            self._look()
            self._learn()

    def _look(self) -> None:
        """Look at the passes that wait."""
        for numbers, group in groupby(self._waiting, lambda one: tuple(one[0])):
            if numbers != self._sequences:  # what others touch does not continue what these did
                self._learn()
                self._begin(numbers)
            self._add(list(group))
        self._waiting.clear()

    def _add(self, passes: list[_Waiting]) -> None:
        """Add passes of the present sequences."""
        residents = np.packbits([(found.msb, found.lsb) for _, _, found, _, _ in passes], axis=3)
        two_slices = self._bytes > 0
        present = (np.bitwise_count(residents).sum(axis=3, dtype=np.int64) * two_slices).sum(axis=2)
        experts = np.concatenate([experts for _, experts, _, _, _ in passes], axis=1)
        layers, count, _ = experts.shape
        used = np.zeros((count, *passes[0][2].msb.shape), bool)
        used[np.arange(count)[:, None], np.arange(layers)[:, None, None], experts] = True
        at = len(self._touched)
        self._touched.extend(np.packbits(used, axis=2))
        for (sequences, _, _, modelled, settled), found, kinds in zip(passes, residents, present.tolist(), strict=True):
            if modelled is not None and kinds[0] >= settled[0] and kinds[1] >= settled[1]:
                self._passes.append(([len(tokens) for tokens in self._tokens], found, modelled))
            for tokens, committed in zip(self._tokens, sequences.values(), strict=True):
                tokens.extend(range(at, at + committed))
                at += committed

    @property
    def ratios(self) -> NDArray[np.float64]:
        """(lengths,) measured over modelled bytes."""
        self._look()
        self._learn()
        return np.divide(self._measured, self._modelled, out=np.ones_like(self._measured), where=self._modelled > 0)

    def _learn(self) -> None:
        """Count the passes behind which each sequence committed enough tokens, and forget what is counted."""
        lengths = [len(tokens) for tokens in self._tokens]
        known = [
            one
            for one in self._passes
            if all(first + self._horizon <= length for first, length in zip(one[0], lengths, strict=True))
        ]
        if known:
            self._count(known)
            del self._passes[: len(known)]
        self._forget()

    def _count(self, known: list[_Pass]) -> None:
        firsts, residents, modelled = zip(*known, strict=True)
        windows = [
            [tokens[first : first + self._horizon] for tokens, first in zip(self._tokens, row, strict=True)]
            for row in firsts
        ]
        touched = np.bitwise_or.accumulate(np.bitwise_or.reduce(np.stack(self._touched)[windows], axis=1), axis=1)
        missing = np.bitwise_count(touched[:, :, None] & ~np.stack(residents)[:, None]).sum(axis=4, dtype=np.int64)
        expected = np.stack(modelled)
        measured = expected.copy()
        measured[:, : len(self._lengths)] = (missing * self._bytes).sum(axis=(2, 3))[:, self._lengths]
        last = len(self._lengths) - 1
        measured[:, last + 1 :] *= (measured[:, last] / np.maximum(expected[:, last], 1.0))[:, None]
        if not self._modelled.any():
            self._measured = self._modelled = PRIOR * expected[0]
        weights = DECAY ** np.arange(len(known))[::-1]
        self._measured = DECAY ** len(known) * self._measured + weights @ measured
        self._modelled = DECAY ** len(known) * self._modelled + weights @ expected

    def _forget(self) -> None:
        """Drop tokens before the first pass that is not counted."""
        if not self._passes:
            self._begin(self._sequences)
            return
        firsts = self._passes[0][0]
        tokens = [row[first:] for row, first in zip(self._tokens, firsts, strict=True)]
        cut = min((row[0] for row in tokens if row), default=len(self._touched))
        del self._touched[:cut]
        self._tokens = [[at - cut for at in row] for row in tokens]
        self._passes = [
            ([own - first for own, first in zip(row, firsts, strict=True)], found, modelled)
            for row, found, modelled in self._passes
        ]
