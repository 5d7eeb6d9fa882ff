"""A prompt is encoded whole, and an answer continues it."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from elmoe.convert.gguf_tokenizer import describe
from elmoe.errors import ConvertError, RequestError, StoreError
from elmoe.text import TextStream
from elmoe.tokenizer import encode, load_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog"


def of_bytes() -> Tokenizer:
    names = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def loaded(tokenizer: Tokenizer) -> Tokenizer:
    return load_tokenizer(tokenizer.to_str().encode(), "tokenizer.json")


def test_truncation_and_padding_of_the_file_do_not_touch_prompts():
    whole = encode(loaded(of_bytes()), TEXT)
    cut, padded = of_bytes(), of_bytes()
    cut.enable_truncation(max_length=8)
    padded.enable_padding(length=64, pad_id=0, pad_token="<end>")
    assert encode(loaded(cut), TEXT) == encode(loaded(padded), TEXT) == whole
    assert len(whole) == len(TEXT)


def test_a_rendered_chat_gets_no_second_special_token():
    tokenizer = of_bytes()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", start)])
    tokenizer = loaded(tokenizer)
    assert encode(tokenizer, "hi").count(start) == 1
    assert encode(tokenizer, "<s>hi", special_tokens=False).count(start) == 1


def test_the_space_between_prompt_and_answer_is_kept():
    vocabulary = {"<end>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocabulary |= {"▁": 257, "a": 258, "b": 259, "▁word": 260}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = loaded(tokenizer)
    prompt = encode(tokenizer, "a b")
    for answer, text in (([260], " word"), ([1 + 0xC3, 1 + 0xA9], "é"), ([], "")):
        stream = TextStream(lambda ids: tokenizer.decode(list(ids)), prompt)
        assert not any(stream.push(token) for token in answer)
        assert stream.take(last=True) == text


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32, "Git LFS pointer"),
        (of_bytes().to_str().encode()[:500], "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not text"),
        (b"[1]", "no JSON object"),
        (b"{}", "not a readable tokenizer"),
        (json.dumps({"model": {"type": "new"}}).encode(), "not a readable tokenizer"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested deeper"),
    ],
    ids=["pointer", "cut", "empty", "binary", "list", "object", "model", "deep"],
)
def test_what_is_no_tokenizer_is_told_with_the_file(raw, told):
    with pytest.raises(ConvertError, match=rf"some/tokenizer\.json.*{told}") as caught:
        load_tokenizer(raw, "some/tokenizer.json", ConvertError)
    assert caught.value.hint
    with pytest.raises(StoreError):
        load_tokenizer(raw, "some/tokenizer.json")


def test_text_that_is_no_unicode_and_no_text_are_refused():
    tokenizer = loaded(of_bytes())
    with pytest.raises(RequestError, match="not UTF-8"):
        encode(tokenizer, "caf\udce9")
    with pytest.raises(RequestError, match="empty"):
        encode(tokenizer, "")


def test_an_id_for_which_tokenizers_would_take_gigabytes_is_refused():
    for number in (1 << 24, 268435460, (1 << 31) - 1):
        data = json.loads(of_bytes().to_str())
        data["model"]["vocab"]["!"] = number
        with pytest.raises(StoreError, match=f"'t.json' has a token with the id {number}"):
            load_tokenizer(json.dumps(data).encode(), "t.json")
        with pytest.raises(ConvertError, match=f"the id {number}"):
            describe(json.dumps(data).encode(), 300)
    data = json.loads(of_bytes().to_str())
    data["added_tokens"] = [{"id": 1 << 30, "content": "x", "single_word": False, "lstrip": False, "rstrip": False,
                             "normalized": False, "special": True}]  # fmt: skip
    with pytest.raises(StoreError, match="the id 1073741824"):
        load_tokenizer(json.dumps(data, separators=(",", ":")).encode(), "t.json")


def test_a_long_number_in_the_text_of_a_token_is_no_id():
    tokenizer = of_bytes()
    tokenizer.add_tokens([": 123456789012"])
    assert encode(loaded(tokenizer), ": 123456789012") == (257,)


def test_a_tokenizer_that_fails_on_a_text_is_no_traceback():
    tokenizer = Tokenizer(models.Unigram([("a", -1.0)]))
    with pytest.raises(RequestError, match="the tokenizer fails on 'abc'"):
        encode(loaded(tokenizer), "abc")
