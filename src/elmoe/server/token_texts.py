"""What single tokens are as text and as bytes, for log-probabilities."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A token of one byte, as SentencePiece writes it."""


class TokenTexts:
    """Texts of the tokens of one tokenizer; those last used are kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
        self._bytes = _bytes_of_characters() if _is_byte_level(tokenizer) else None
        self.of = lru_cache(1 << 16)(self._of)

    def _of(self, token: int) -> tuple[str, bytes]:
        """Text and bytes of a token; bytes that are no text are U+FFFD in the text."""
        raw = self._raw(token)
        return raw.decode("utf-8", "replace"), raw

    def _raw(self, token: int) -> bytes:
        if token in self._special:
            return self._special[token].encode()
        written = self._tokenizer.id_to_token(token) or ""
        if self._bytes is not None and all(char in self._bytes for char in written):
            return bytes(self._bytes[char] for char in written)
        byte = _BYTE.fullmatch(written)
        if byte is not None:
            return bytes([int(byte.group(1), 16)])
        return written.replace("\u2581", " ").encode()


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the characters of tokens stand for bytes, as GPT-2's do."""
    state: Any = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b"{}"
    found = json.loads(state)
    parts = found.get("decoders", []) if found.get("type") == "Sequence" else [found]
    return any(part.get("type") == "ByteLevel" for part in parts)


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}
