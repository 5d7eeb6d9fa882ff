"""Text to token ids and back, as a prompt needs it: the whole text, and an answer that continues its prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from elmoe.errors import ElmoeError, RequestError, StoreError
from elmoe.untrusted import load_object, short, text_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_LIMIT = 256 << 20
"""Largest tokenizer.json, bytes."""
MOST_TOKENS = 1 << 24
"""Least id that no token may have."""
_LARGE_ID = re.compile(r":\s*[0-9]{8}")
"""A number of a mapping that may be above ``MOST_TOKENS``: a quick look, before all is read as JSON."""


def load_tokenizer(raw: bytes, where: str, error: type[ElmoeError] = StoreError) -> Tokenizer:
    """A tokenizer.json; its truncation and padding, which a training run left there, are switched off.

    :raises ElmoeError: an ``error`` for a Git LFS pointer, a file that was cut off, or one that is no tokenizer.
    """
    from tokenizers import Tokenizer

    hint = "download the tokenizer.json of the model anew"
    text = text_of(raw, where, error, hint)
    if _LARGE_ID.search(text):  # tokenizers makes room for every id up to the largest
        _check_ids(load_object(raw, where, error, hint, repeated_keys=True), where, error, hint)
    try:
        tokenizer = Tokenizer.from_str(text)
    except BaseException as reason:
        reraise_foreign(reason)
        load_object(raw, where, error, hint, repeated_keys=True)  # says more, where it is no JSON at all
        raise error(f"'{where}' is not a readable tokenizer: {short(reason)}", hint) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_ids(data: Mapping[str, Any], where: str, error: type[ElmoeError], hint: str) -> None:
    """An ``error`` where a token has an id that is no small number."""
    model, added = data.get("model"), data.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [entry.get("id") for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    for number in ids:
        if isinstance(number, int | float) and not number < MOST_TOKENS:
            raise error(f"'{where}' has a token with the id {number}, allowed are ids below {MOST_TOKENS}", hint)


def reraise_foreign(reason: BaseException) -> None:
    """Raise what does not come of a library in Rust; those raise bare Exception, and their panics are BaseException."""
    if isinstance(reason, ElmoeError | MemoryError) or not (
        isinstance(reason, Exception) or type(reason).__name__ == "PanicException"
    ):
        raise reason


def encode(tokenizer: Tokenizer, text: str, special_tokens: bool = True) -> tuple[int, ...]:
    """Ids of a whole text; RequestError if there are none, or the text is no Unicode.

    :param special_tokens: add those that the tokenizer begins a text with; off for a rendered chat, which has its own.
    """
    if re.search("[\ud800-\udfff]", text):
        raise RequestError(f"the text '{short(text, 40)}' is not UTF-8", "convert it, for example with iconv -t utf-8")
    try:
        ids = tuple(tokenizer.encode(text, add_special_tokens=special_tokens).ids)
    except BaseException as reason:
        reraise_foreign(reason)
        raise RequestError(f"the tokenizer fails on '{short(text, 40)}': {short(reason)}", "give another text") from None
    if not ids:
        raise RequestError("the prompt is empty", "give some text")
    return ids


def split_stops(tokenizer: Tokenizer, stops: Iterable[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What ends a text, as (strings, token ids): the text of a special token is never part of an answer, so its id has to
    end it."""
    special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    texts = list(stops)
    return tuple(text for text in texts if text not in special), tuple(special[text] for text in texts if text in special)
