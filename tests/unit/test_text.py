"""Streaming text: pieces join to the whole decoding, characters are never cut, stop strings never shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from elmoe.text import TextStream

ALPHABET = "aé€😀 \n"


def byte_decode(ids) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def stream(tokens, stop=(), prompt=()) -> tuple[str, list[str], bool]:
    one, pieces = TextStream(byte_decode, prompt, stop), []
    for token in tokens:
        done = one.push(token)
        pieces.append(one.take())
        if done:
            break
    pieces.append(one.take(last=True))
    return "".join(pieces), pieces, one.stopped


@given(st.text(ALPHABET, max_size=30), st.text(ALPHABET, max_size=5))
def test_pieces_join_to_the_text(text, prompt):
    whole, pieces, stopped = stream(text.encode(), prompt=prompt.encode())
    assert whole == text and not stopped and not any("\ufffd" in piece for piece in pieces)


@given(st.text("ab€", max_size=20), st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stop):
    whole, pieces, stopped = stream(text.encode(), stop)
    ends = [(text.find(one) + len(one.encode()), text.find(one)) for one in stop if one in text]
    assert stopped == bool(ends)
    if not ends:
        assert whole == text
        return
    # the token that completes a stop string first ends the text; of those it completes, the earliest begin counts
    complete = min(len(text[: text.find(one)].encode()) + len(one.encode()) for one in stop if one in text)
    seen = text.encode()[:complete].decode(errors="ignore")
    assert whole == seen[: min(seen.find(one) for one in stop if one in seen)]
    for size in range(1, len(pieces) + 1):
        assert not any(one in "".join(pieces[:size]) for one in stop)


def test_bytes_that_are_no_character_are_shown_once_they_cannot_be():
    whole, _, _ = stream(b"a\xff\xffb")
    assert whole == byte_decode(b"a\xff\xffb")


def test_a_decoder_that_strips_spaces_keeps_the_one_behind_the_prompt():
    vocabulary = {"<unk>": 0, "▁the": 1, "▁whale": 2, "s": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    one = TextStream(lambda ids: tokenizer.decode(list(ids)), [1])
    assert tokenizer.decode([2]) == "whale"
    one.push(2)
    one.push(3)
    assert one.take(last=True) == " whales"
