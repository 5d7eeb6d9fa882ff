"""SentencePiece tokenizers (GGUF's ``llama``) as tokenizer.json: byte-pair merges by the scores of their results.

GGUF carries tokens, scores and types, no merges. A merge exists for every two tokens whose texts join to a third; the order
is that of scores, as in SentencePiece, which merges the pair of the best result first. transformers converts Llama's
tokenizer.model in the same way.
"""

from __future__ import annotations

from typing import Any

from gguf import Keys, TokenType
from tokenizers import Tokenizer, decoders, models, normalizers

from elmoe.errors import ConvertError

SPACE = "▁"
PRECOMPILED = "tokenizer.ggml.precompiled_charsmap"


def sentencepiece(metadata: dict[str, Any], tokens: list[str], types: list[int], hint: str) -> Tokenizer:
    """The tokenizer without its added tokens and what it puts before a text.

    :raises ConvertError: the scores are missing, or the normaliser is one that is not known.
    """
    scores = metadata.get(Keys.Tokenizer.SCORES)
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ConvertError(f"metadata '{Keys.Tokenizer.SCORES}' has not one for each token", hint)
    if metadata.get(Keys.Tokenizer.REMOVE_EXTRA_WS) is True:
        raise ConvertError(f"metadata '{Keys.Tokenizer.REMOVE_EXTRA_WS}' is not supported", hint)
    if metadata.get(PRECOMPILED):
        raise ConvertError(f"metadata '{PRECOMPILED}' is a normaliser that is not supported", hint)
    if tokens.count("<0x00>") != 1 or TokenType.BYTE not in types:
        raise ConvertError("metadata: the tokens lack single bytes such as <0x00>", hint)
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != TokenType.UNUSED}
    skipped = {TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE, TokenType.UNUSED, TokenType.USER_DEFINED}
    pieces = [(token, scores[index]) for index, token in enumerate(tokens) if types[index] not in skipped]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = metadata.get(Keys.Tokenizer.ADD_PREFIX, True) is not False
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefixed else []),
        ]
    )  # fmt: skip
    return tokenizer


def merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """All merges of (token, score) pieces, the best result first; of one result, the pair of the lowest ids first."""
    ids = {token: index for index, (token, _) in enumerate(pieces)}
    found: list[tuple[float, int, int, int, str, str]] = []
    for index, (token, score) in enumerate(pieces):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, index, ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
