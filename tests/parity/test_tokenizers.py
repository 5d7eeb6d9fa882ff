"""Tokenizers rebuilt from GGUF's metadata give the ids of the real tokenizer.json, over texts of all scripts: `make parity`
fetches them into build/tokenizers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Tokenizer

from elmoe.convert.gguf_tokenizer import rebuild
from elmoe.convert.pre_tokenizers import name_of
from elmoe.tokenizer import load_tokenizer
from tests.texts import texts

FOLDER = Path(os.environ.get("ELMOE_TOKENIZERS", Path(__file__).parents[2] / "build" / "tokenizers"))
PRE = {
    "llama2": None, "llama3": "llama-bpe", "llama3_1": "llama-bpe", "qwen3": "qwen2", "gpt4o": "gpt-4o", "gptoss": "gpt-4o",
    "deepseek_v3": "deepseek-v3",
}  # fmt: skip
"""What llama.cpp's converter calls the pre-tokenizer; None is SentencePiece."""


def metadata_of(data: dict[str, Any], pre: str | None, begins: int | None) -> dict[str, Any]:
    """As llama.cpp's converter writes it: tokens, types, merges or scores, and the begin."""
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    joined = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    added = {entry["id"]: entry for entry in data["added_tokens"]}
    size = max([*vocabulary.values(), *added]) + 1
    tokens, types = [f"[PAD{index}]" for index in range(size)], [int(TokenType.UNUSED)] * size
    for token, index in vocabulary.items():
        byte = pre is None and token.startswith("<0x") and token.endswith(">")
        tokens[index], types[index] = token, int(TokenType.BYTE if byte else TokenType.NORMAL)
    for index, entry in added.items():
        kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        tokens[index], types[index] = entry["content"], int(kind)
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if pre is None else "gpt2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.add_bos_token": begins is not None,
    }  # fmt: skip
    if begins is not None:
        found["tokenizer.ggml.bos_token_id"] = begins
    if pre is None:
        types[0] = int(TokenType.UNKNOWN)
        # tokenizer.json has no scores, but its merges are in the order of them.
        place = {"".join(pair.split(" ")): -float(index) for index, pair in reversed(list(enumerate(joined)))}
        found["tokenizer.ggml.scores"] = [place.get(token, -1e6) for token in tokens]
    else:
        found["tokenizer.ggml.pre"] = pre
        found["tokenizer.ggml.merges"] = joined
    return found


@pytest.mark.parametrize("name", PRE)
def test_ids_are_those_of_the_real_tokenizer(name):
    path = FOLDER / f"{name}.json"
    if not path.exists():
        pytest.skip("no tokenizers: python tests/parity/fetch_tokenizers.py build/tokenizers")
    data, real = json.loads(path.read_text(encoding="utf-8")), load_tokenizer(path.read_bytes(), name)
    bare, full = (real.encode("a", add_special_tokens=special).ids for special in (False, True))
    begins = full[0] if full != bare else None
    ours = Tokenizer.from_str(rebuild(metadata_of(data, PRE[name], begins)).decode())
    if PRE[name] is not None and bool(data["model"].get("ignore_merges")) == (PRE[name] in ("llama-bpe", "gpt-4o")):
        assert name_of(json.loads(real.to_str())) == PRE[name]
    added = tuple(entry["content"] for entry in data["added_tokens"])
    checked = different = 0
    for text in texts(added[:300]):
        expected, found = real.encode(text).ids, ours.encode(text).ids
        checked += 1
        if found != expected:
            different += 1
            print(f"\n{name}: {text!r}\n  {expected}\n  {found}")
        else:
            for skip in (False, True):
                assert ours.decode(found, skip_special_tokens=skip) == real.decode(expected, skip_special_tokens=skip), text
    print(f"\n{name}: {checked} texts, {different} differ", end="")
    assert different == 0 and checked > 1000
