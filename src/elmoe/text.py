"""Tokens to text as they come: whole characters, the spaces that the prompt before them implies, no stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

CONTEXT = 6
"""Tokens before the new ones that are decoded with them: a decoder may need its neighbours to place spaces."""
INCOMPLETE = "\ufffd"
"""What a decoder writes for bytes that are no whole character yet."""
LONGEST_CHARACTER = 4
"""Bytes of the longest UTF-8 character: a replacement that more tokens do not complete stays one."""

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""


class TextStream:
    """The text of one sequence. ``push`` takes a token and tells whether a stop string ended the text; ``take`` returns the
    text since the last call that no later token can change.

    :param prompt: tokens before the first one. :param stop: strings that end the text and are not part of it.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._window = list(prompt[-CONTEXT:])
        self._shown = decode(self._window)
        self._pending = 0  # tokens of the window whose characters are not whole
        self._open = ""  # whole characters that may begin a stop string
        self._ready = ""
        self.stopped = False

    def push(self, token: int) -> bool:
        """Add a token; True once a stop string is complete."""
        if self.stopped:
            return True
        self._window.append(token)
        self._pending += 1
        text = self._decode(self._window)
        if text.endswith(INCOMPLETE) and self._pending < LONGEST_CHARACTER:
            return False
        self._add(text[len(self._shown) :])
        del self._window[:-CONTEXT]
        self._shown, self._pending = self._decode(self._window), 0
        return self.stopped

    def _add(self, piece: str) -> None:
        """Take over whole characters; what may begin a stop string waits."""
        text = self._open + piece
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._ready, self._open, self.stopped = self._ready + text[: min(found)], "", True
            return
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._ready += text[: len(text) - held]
        self._open = text[len(text) - held :]

    def take(self, last: bool = False) -> str:
        """Text since the last call; ``last``: the sequence has ended, so that what waited is text as well."""
        if last and not self.stopped:
            if self._pending:
                self._add(self._decode(self._window)[len(self._shown) :])
                self._pending = 0
            self._ready, self._open = self._ready + self._open, ""
        text, self._ready = self._ready, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that begin ``stop``."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
