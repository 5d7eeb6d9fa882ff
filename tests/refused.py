"""What tests of the Python API ask: whether a model is idle, and what a call is refused with."""

from __future__ import annotations

import pytest

from elmoe.errors import RequestError

WHALE = "The whale"


def idle(model) -> bool:
    """Nobody is served and every page of the cache is free."""
    engine = model.engine
    return not engine.has_work and engine.cache.free_pages == engine.cache.pages


def told(*arguments, error=RequestError, **named):
    """What a call is refused with, and the hint."""
    call, *rest = arguments
    with pytest.raises(error) as caught:
        call(*rest, **named)
    return f"{caught.value} | {caught.value.hint}"
