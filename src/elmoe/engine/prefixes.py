"""Which pages of the KV cache hold which text, so that a text that begins alike is computed once.

A page is known by its tokens and by the page before it. Only full pages are known, and only once the target has computed all
of their positions: what drafts wrote there, verification has written anew, and what they write later lies behind. Keys and
values do not depend on how they were computed (see docs/exactness.md), so a page that is found is what would be computed.

A page that no sequence holds *rests*, and is given up when its room is needed, the one first that rests longest. Who holds a
page holds all before it, and lets go of the last one first, so a page is never given up before those that follow it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

NONE = -1
"""The page before the first."""
_Key = tuple[int, tuple[int, ...]]


class Prefixes:
    """The index of pages. :param most: pages that may rest; 0 keeps none. :param positions: of a page."""

    def __init__(self, most: int, positions: int) -> None:
        self.most, self._positions = most, positions
        self._page: dict[_Key, int] = {}
        self._key: dict[int, _Key] = {}
        self._resting: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, page: int) -> bool:
        return page in self._key

    @property
    def resting(self) -> int:
        """Pages that no sequence holds."""
        return len(self._resting)

    def find(self, page: int, tokens: Sequence[int], first: int, last: int) -> list[int]:
        """Pages that follow ``page`` with the tokens of the stretches [first, last)."""
        found: list[int] = []
        for stretch in range(first, last):
            following = self._page.get((page, self._tokens(tokens, stretch)))
            if following is None:
                break
            page = following
            found.append(page)
        return found

    def add(self, before: int, tokens: Sequence[int], stretch: int, page: int) -> int:
        """Take in a page that follows ``before``; returns the page of these tokens, another one where there was one."""
        key = before, self._tokens(tokens, stretch)
        known = self._page.setdefault(key, page)
        if known == page:
            self._key[page] = key
        return known

    def rest(self, page: int) -> None:
        """Nobody holds the page any more."""
        self._resting[page] = None

    def wake(self, page: int) -> None:
        """Somebody holds the page again."""
        del self._resting[page]

    def give_up(self) -> int:
        """Forget the page that rests longest, and return it."""
        page, _ = self._resting.popitem(last=False)
        del self._page[self._key.pop(page)]
        return page

    def _tokens(self, tokens: Sequence[int], stretch: int) -> tuple[int, ...]:
        return tuple(tokens[stretch * self._positions : (stretch + 1) * self._positions])
