"""What earlier tokens and a caller's bias change in the logits of a position.

For the logit ``x`` of a token id, in float32 with one rounding an operation:

1. logit bias: ``x + bias``;
2. repetition penalty ``r``, for ids of the prompt or the answer, as in transformers and vLLM: ``x / r`` where ``x > 0``,
   else ``x * r``;
3. frequency penalty ``f``: ``x - count * f``, and presence penalty ``p``: ``x - p`` where ``count > 0``; ``count`` is of the
   id in the answer alone, as OpenAI and vLLM have it (llama.cpp counts the prompt as well).

What overflows becomes the largest float32 of its sign. The answer are the tokens before the position, drafted ones included,
so that draft and target adjust alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.sampling import SamplingParameters

LARGEST = np.finfo(np.float32).max


class History:
    """The tokens of one answer as its penalties count them, and its bias.

    :param prompt: token ids before the answer.
    """

    def __init__(self, parameters: SamplingParameters, prompt: Sequence[int]) -> None:
        self._bias_ids = np.array([token for token, _ in parameters.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in parameters.logit_bias], np.float32)
        self._presence, self._frequency = np.float32(parameters.presence_penalty), np.float32(parameters.frequency_penalty)
        self._repetition = np.float32(parameters.repetition_penalty)
        self._counts_tokens = parameters.penalizes
        known = dict.fromkeys(prompt) if self._repetition != 1 else {}
        self._index = {token: index for index, token in enumerate(known)}
        self._of_prompt = len(self._index)  # the first ids
        self._ids = np.fromiter(self._index, np.int64, self._of_prompt)
        self._counts = np.zeros(self._of_prompt, np.float32)

    @staticmethod
    def of(parameters: SamplingParameters, prompt: Sequence[int]) -> History | None:
        """A history, or None where it would change nothing."""
        return History(parameters, prompt) if parameters.penalizes or parameters.logit_bias else None

    def push(self, token: int) -> None:
        """The answer goes on with a token."""
        if not self._counts_tokens:
            return
        index = self._index.setdefault(token, len(self._index))
        if index == len(self._ids):  # room for twice as many
            self._ids = np.concatenate([self._ids, np.zeros(index + 16, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(index + 16, np.float32)])
        self._ids[index] = token
        self._counts[index] += 1

    def adjust(self, logits: NDArray[np.float32], behind: Sequence[int] = ()) -> NDArray[np.float32]:
        """The adjusted logits (vocabulary,) of the position behind the answer and the tokens ``behind`` it."""
        adjusted = logits.copy()
        adjusted[self._bias_ids] += self._bias
        if self._counts_tokens:
            for token in behind:
                self.push(token)
            self._penalize(adjusted)
            for token in behind:
                self._counts[self._index[token]] -= 1
        return adjusted

    def _penalize(self, adjusted: NDArray[np.float32]) -> None:
        size = len(self._index)
        ids, counts = self._ids[:size], self._counts[:size]
        used, values = counts > 0, adjusted[ids]
        with np.errstate(over="ignore"):
            if self._repetition != 1:
                seen = used | (np.arange(size) < self._of_prompt)
                penalized = np.where(values > 0, values / self._repetition, values * self._repetition)
                values = np.where(seen, penalized, values)
            values = values - counts * self._frequency
            values = values - np.where(used, self._presence, np.float32(0))
        adjusted[ids] = np.clip(values, -LARGEST, LARGEST)
