"""Tokenizers of GGUF files without downloads: how each pre-tokenizer cuts, trained tokenizers there and back, SentencePiece,
and what is refused. tests/parity/test_tokenizers.py compares with real ones."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from elmoe.convert.gguf_tokenizer import describe, eos_tokens, rebuild
from elmoe.convert.pre_tokenizers import PRE_TOKENIZERS, name_of
from elmoe.convert.sentencepiece import merges
from elmoe.errors import ConvertError
from tests.texts import texts

TEXT = "It's  12345 HTTPServer's x1\n\n  ñ한!!\n"
DEEPSEEK = [
    "It", "'", "s", "  ", "1", "2", "3", "4", "5", " HTTPServer", "'", "s", " x", "1", "\n", "\n", " ", " ñ", "한", "!!",
    "\n",
]  # fmt: skip
PIECES = {
    "gpt-2": ["It", "'s", " ", " 12345", " HTTPServer", "'s", " x", "1", "\n\n ", " ñ한", "!!", "\n"],
    "qwen2": ["It", "'s", " ", " ", "1", "2", "3", "4", "5", " HTTPServer", "'s", " x", "1", "\n\n", " ", " ñ한", "!!\n"],
    "llama-bpe": ["It", "'s", " ", " ", "123", "45", " HTTPServer", "'s", " x", "1", "\n\n", " ", " ñ한", "!!\n"],
    "smollm": ["It", "'s", "  ", "1", "2", "3", "4", "5", " HTTPServer", "'s", " x", "1", "\n\n ", " ñ한", "!!", "\n"],
    "gpt-4o": ["It's", " ", " ", "123", "45", " HTTPServer's", " x", "1", "\n\n", " ", " ñ한", "!!\n"],
    "deepseek-llm": DEEPSEEK,
    "deepseek-coder": DEEPSEEK,
    "deepseek-v3": ["It", "'s", "  ", "123", "45", " HTTPServer", "'s", " x", "1", "\n\n", " ", " ñ한", "!!\n"],
}  # fmt: skip
SAME = {
    "olmo": "gpt-2", "deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "glm4": "llama-bpe",
    "chatglm-bpe": "llama-bpe", "starcoder": "smollm", "refact": "smollm",
}  # fmt: skip
"""Those that cut as another does."""


def pieces(name: str, text: str) -> list[str]:
    """Where a text is cut; ByteLevel's own alphabet is left out of it."""
    return [text[begin:end] for _, (begin, end) in PRE_TOKENIZERS[name].build().pre_tokenize_str(text)]


def test_every_pre_tokenizer_has_its_cuts_here():
    assert set(PRE_TOKENIZERS) == set(PIECES) | set(SAME)


NAMES = [pytest.param(name, marks=[pytest.mark.full] if name in SAME else []) for name in PRE_TOKENIZERS]
"""All; in the quick tier those whose cuts differ."""


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_text_is_cut_as_the_models_tokenizer_cuts_it(name):
    assert pieces(name, TEXT) == PIECES[SAME.get(name, name)]


@pytest.mark.parametrize("name", NAMES)
def test_every_text_is_whole_after_it_was_cut(name):
    for text in texts():
        assert "".join(pieces(name, text)) == text


def trained(name: str) -> Tokenizer:
    """A byte-level BPE over the texts, with added tokens."""
    tokenizer, pre = Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[name].ignore_merges)), PRE_TOKENIZERS[name]
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre.build(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=["<|s|>", "<|e|>"], show_progress=False
    )
    tokenizer.train_from_iterator(list(texts())[:200], trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|s|> $A", pair=None, special_tokens=[("<|s|>", 0)])
    return tokenizer


def metadata_of(tokenizer: Tokenizer, pre: str) -> dict:
    described = describe(tokenizer.to_str().encode(), 950)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": described.tokens,
        "tokenizer.ggml.token_type": described.types, "tokenizer.ggml.merges": described.merges,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": described.add_bos,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name):
    before = trained(name)
    pre = describe(before.to_str().encode(), 950).pre
    assert PRE_TOKENIZERS[pre].build().__getstate__() == PRE_TOKENIZERS[name].build().__getstate__()
    after = Tokenizer.from_str(rebuild(metadata_of(before, name)).decode())
    for text in texts(("<|s|>", "<|e|>", "<think>"), seed=3):
        ids = before.encode(text).ids
        assert after.encode(text).ids == ids and ids[0] == 0
        assert after.decode(ids) == before.decode(ids)


def test_whether_a_begin_is_put_before_a_text_where_the_file_does_not_say():
    for name, begins in (("llama-bpe", True), ("qwen2", False)):
        metadata = metadata_of(trained(name), name)
        del metadata["tokenizer.ggml.add_bos_token"]
        ids = Tokenizer.from_str(rebuild(metadata).decode()).encode("a").ids
        assert (ids[0] == 0) == begins and len(ids) == 1 + begins
    metadata |= {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eos_token_id": 1}
    assert Tokenizer.from_str(rebuild(metadata).decode()).encode("a").ids[-1] == 1


def test_other_cuts_have_no_name():
    data = json.loads(trained("llama-bpe").to_str())
    assert name_of(data) == "llama-bpe"
    for change in (
        {"normalizer": {"type": "NFKC"}}, {"pre_tokenizer": None}, {"model": data["model"] | {"ignore_merges": False}},
    ):  # fmt: skip
        assert name_of(data | change) in (None, "glm4")
    steps = data["pre_tokenizer"]["pretokenizers"]
    for changed in (
        [steps[0] | {"behavior": "Removed"}, steps[1]], [steps[0] | {"invert": True}, steps[1]], [steps[1], steps[0]],
        [steps[0] | {"pattern": {"Regex": r"\s+"}}, steps[1]], [steps[0], steps[1] | {"add_prefix_space": True}],
        [steps[0], steps[1] | {"use_regex": True}], [{"type": "Whitespace"}, steps[1]], [],
    ):  # fmt: skip
        assert name_of(data | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": changed}}) is None


TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    "t",
    "h",
    "e",
    "a",
    "▁t",
    "he",
    "▁the",
    "th",
    "<tool>",
]


def spm(**changes: object) -> dict:
    kinds = [2, 3, 3, *[6] * 256, *[1] * 9, 4]
    scores = [0.0] * 259 + [-20.0, -21.0, -22.0, -23.0, -24.0, -1.0, -3.0, -4.0, -2.0, 0.0]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, **changes,
    }  # fmt: skip


def spm_ids(text: str, **changes: object) -> list[str]:
    tokenizer = Tokenizer.from_str(rebuild(spm(**changes)).decode())
    return [TOKENS[index] for index in tokenizer.encode(text).ids]


def test_sentencepiece_merges_the_best_result_first():
    # "▁t" (-1) comes before "th" (-2), and "he" (-3) joins it to "▁the".
    assert spm_ids("the") == ["<s>", "▁the"]
    assert spm_ids("athe") == ["<s>", "▁", "a", "th", "e"]
    assert spm_ids("é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert spm_ids("the<tool>the</s>") == ["<s>", "▁the", "<tool>", "▁the", "</s>"]
    assert spm_ids("the", **{"tokenizer.ggml.add_bos_token": False}) == ["▁the"]
    assert spm_ids("the", **{"tokenizer.ggml.add_space_prefix": False}) == ["<s>", "th", "e"]
    assert merges([("a", -2.0), ("b", -3.0), ("ab", -5.0), ("ba", -4.0), ("aba", -1.0)]) == [
        ("a", "ba"), ("ab", "a"), ("b", "a"), ("a", "b"),
    ]  # fmt: skip
    decode = Tokenizer.from_str(rebuild(spm()).decode())
    assert decode.decode(decode.encode("the é  the").ids) == "the é  the"


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"tokenizer.ggml.scores": None}, r"tokenizer\.ggml\.scores"),
        ({"tokenizer.ggml.scores": [0.0]}, r"tokenizer\.ggml\.scores"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "precompiled_charsmap"),
        ({"tokenizer.ggml.token_type": [1] * len(TOKENS)}, "lack single bytes"),
        ({"tokenizer.ggml.token_type": [1]}, "not as many as their types"),
        ({"tokenizer.ggml.bos_token_id": None}, "id of the begin is None"),
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer\.ggml\.model' is 'bert'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default"}, r"tokenizer\.ggml\.pre' is 'default'"),
        ({"tokenizer.ggml.model": "gpt2"}, r"tokenizer\.ggml\.pre' is None"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": ["qwen2"]}, r"tokenizer\.ggml\.pre' is \['qwen2'\]"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes, message):
    with pytest.raises(ConvertError, match=message) as caught:
        rebuild(spm(**changes))
    assert "--tokenizer" in (caught.value.hint or "") or "damaged" in (caught.value.hint or "")


@pytest.mark.parametrize("types", [[3], [1, 3, 3], [3, 1]])
def test_ends_are_found_whatever_the_number_of_types(types):
    """Whether there are as many as tokens is told where the tokenizer is rebuilt."""
    metadata = {"tokenizer.ggml.tokens": ["<|im_end|>", "<|endoftext|>"], "tokenizer.ggml.token_type": types}
    expected = [index for index, kind in enumerate(types[:2]) if kind == 3]
    assert eos_tokens(metadata, 2) == expected
