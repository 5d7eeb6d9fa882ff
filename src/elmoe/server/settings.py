"""How the server behaves: limits, keys and names. All bounds are here."""

from __future__ import annotations

from dataclasses import dataclass

MOST_MESSAGES, MOST_STOPS, LONGEST_STOP, MOST_PROMPTS = 4096, 16, 256, 64
"""Messages of a chat, stop strings of a request, characters of one, prompts of a request."""
MOST_BIASES = 1024
"""Tokens of a ``logit_bias``."""


@dataclass(frozen=True)
class Settings:
    """Limits of the server.

    ``queue``: answers that may wait beside those that run. ``body_bytes``: largest body; ``all_body_bytes``: of all bodies
    that are being received or whose answer is awaited whole. ``prompt_tokens``: longest prompt; None is the context.
    ``answers``: largest ``n``, prompts of one request counted. ``request_seconds``: longest time of a request, waiting
    included. ``body_seconds``: longest time for a body, or the head of a request, to arrive. ``event_seconds``: least time
    between events of a stream: what comes meanwhile is sent together, because an event costs a client more of the processor
    than a token of a small model. ``ping_seconds``: silence on a stream after which a comment is sent. ``connections``: open
    at once.
    """

    model_name: str
    keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    queue: int = 64
    body_bytes: int = 4 << 20
    all_body_bytes: int = 32 << 20
    prompt_tokens: int | None = None
    answers: int = 16
    request_seconds: float = 3600.0
    body_seconds: float = 30.0
    event_seconds: float = 0.02
    ping_seconds: float = 5.0
    connections: int = 1024
