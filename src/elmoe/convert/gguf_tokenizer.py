"""Tokenizers as GGUF metadata, and back: byte-level BPE (``gpt2``) both ways, SentencePiece (``llama``) from a file.

An exported file carries the whole tokenizer.json too (``tokenizer.huggingface.json``, a key of the GGUF specification); it
is what an import takes if it is there. Without it the tokenizer is rebuilt from tokens, types, merges and the name of its
pre-tokenizer, or from tokens, types and scores. What GGUF does not know is lost then: how added tokens strip spaces, and
normalisers other than the known.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gguf import Keys, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from elmoe.chat import special_tokens_of
from elmoe.convert.pre_tokenizers import PRE_TOKENIZERS, name_of
from elmoe.convert.sentencepiece import sentencepiece
from elmoe.errors import ConvertError, ElmoeError
from elmoe.tokenizer import load_tokenizer
from elmoe.untrusted import load_object, short

GIVE_TOKENIZER = "give the model's tokenizer.json with --tokenizer"
_SPECIAL_KEYS = {
    "eos": Keys.Tokenizer.EOS_ID, "eot": Keys.Tokenizer.EOT_ID, "eom": Keys.Tokenizer.EOM_ID,
    "bos": Keys.Tokenizer.BOS_ID,
}  # fmt: skip
ALL_EOS_KEY = "elmoe.eos_token_ids"
"""Our own key: all ids of the end, of which GGUF has keys for two; the text `none` if there are none."""
END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>",
    "<|fim_pad|>", "<|fim_repo|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
"""Texts of the control tokens at which llama.cpp ends a generation, whatever the metadata says: those of Qwen's file
completion too. A normal token of such a text does not end one here."""

SPECIAL_TOKENS_KEY = "elmoe.special_tokens"
"""Our own key: the variables of the chat template, as JSON, of which GGUF knows the begin and the end alone."""


@dataclass(frozen=True)
class GgufTokenizer:
    """What GGUF says of a tokenizer. ``tokens``, ``types``: one for each row of the embedding. ``add_bos``: the id that
    begins every text."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    add_bos: int | None


def describe(tokenizer_json: bytes, vocabulary: int) -> GgufTokenizer:
    """A tokenizer.json in GGUF's terms; ids that no token has become unused ones.

    :raises ConvertError: it is no byte-level BPE with a known pre-tokenizer, or has more tokens than the ``vocabulary``.
    """
    try:
        tokenizer = load_tokenizer(tokenizer_json, "tokenizer.json", ConvertError)
        data = json.loads(tokenizer.to_str())  # as the library understood it: defaults filled in, merges in pairs
    except ConvertError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ConvertError(f"tokenizer.json is not readable: {short(error)}") from error
    model = data["model"]
    plain = model["type"] == "BPE" and not any(
        model.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    )
    if not plain or (data["decoder"] or {}).get("type") != "ByteLevel":
        raise ConvertError("tokenizer.json is no byte-level BPE", "GGUF's gpt2 tokenizer is the only one that is written")
    tokens: list[str | None] = [None] * vocabulary
    types = [int(TokenType.UNUSED)] * vocabulary
    added = {entry["id"]: entry for entry in data["added_tokens"]}
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index >= vocabulary:
            raise ConvertError(f"token {index} of tokenizer.json is beyond the model's vocabulary of {vocabulary}")
        kind = TokenType.NORMAL if index not in added else TokenType.USER_DEFINED
        tokens[index] = token
        types[index] = int(TokenType.CONTROL if index in added and added[index]["special"] else kind)
    names = [token if token is not None else f"[PAD{index}]" for index, token in enumerate(tokens)]
    if len(set(names)) < vocabulary:
        raise ConvertError("tokenizer.json has a token with the name of a filler ([PAD...])")
    merges = [" ".join(pair) for pair in model["merges"]]
    pre = name_of(data)
    if pre is None:
        raise ConvertError(
            "tokenizer.json has a pre-tokenizer or normaliser that GGUF has no known name for",
            f"known: those of {', '.join(PRE_TOKENIZERS)}",
        )
    return GgufTokenizer(pre, names, types, merges, _first_token(tokenizer))


def _first_token(tokenizer: Tokenizer) -> int | None:
    """The id that the post-processor puts before every text; ConvertError if it does more than that."""
    bare, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    if full == bare:
        return None
    if full[1:] == bare:
        return int(full[0])
    raise ConvertError("the tokenizer adds more than one token before a text", "GGUF cannot say that")


def idle_merge(tokens: list[str]) -> str:
    """A merge that never applies, for a tokenizer without any: llama.cpp refuses a file with none."""
    known = set(tokens)
    return next(f"{token} {token}" for token in tokens if token + token not in known)


def eos_tokens(metadata: dict[str, Any], vocabulary: int) -> list[int]:
    """Ids that end a generation: those that a file of ours lists, else those of the metadata and, as in llama.cpp, of the
    ``END_TEXTS``; ConvertError if one is no token."""
    found = metadata.get(ALL_EOS_KEY)
    if found == "none":
        return []
    if isinstance(found, list):
        ids = found
    else:
        ids = [metadata.get(_SPECIAL_KEYS[name]) for name in ("eos", "eot", "eom")]
        tokens, types = metadata.get(Keys.Tokenizer.LIST), metadata.get(Keys.Tokenizer.TOKEN_TYPE)
        if isinstance(tokens, list) and isinstance(types, list):
            ids += [
                index
                for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
                if kind == TokenType.CONTROL and token in END_TEXTS
            ]
    present = dict.fromkeys(index for index in ids if index is not None)
    return [_check_id(index, vocabulary, "an id of the end") for index in present]


def _check_id(index: Any, vocabulary: int, what: str) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < vocabulary:
        raise ConvertError(f"metadata: {what} is {index!r}, the vocabulary has {vocabulary} tokens", "the file is damaged")
    return index


def tokens_of(metadata: dict[str, Any]) -> list[str]:
    """The list of tokens; ConvertError if it is missing or malformed."""
    tokens = metadata.get(Keys.Tokenizer.LIST)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ConvertError(f"metadata '{Keys.Tokenizer.LIST}' is no list of tokens", GIVE_TOKENIZER)
    return tokens


def template_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """Texts of special tokens by the variables of chat templates: those that a file of ours carries, else the tokens that
    begin and end."""
    carried = metadata.get(SPECIAL_TOKENS_KEY)
    if isinstance(carried, str):
        return special_tokens_of(load_object(carried, SPECIAL_TOKENS_KEY, ConvertError, "download the file anew"))
    tokens, ids = tokens_of(metadata), {name: metadata.get(_SPECIAL_KEYS[name]) for name in ("bos", "eos")}
    return {
        f"{name}_token": tokens[_check_id(index, len(tokens), f"the id of {name}")]
        for name, index in ids.items()
        if index is not None
    }


def rebuild(metadata: dict[str, Any]) -> bytes:
    """The tokenizer.json of a GGUF's metadata.

    :raises ConvertError: the tokenizer is of another kind, has an unknown pre-tokenizer, or is malformed.
    """
    tokens = tokens_of(metadata)
    if metadata.get(Keys.Tokenizer.HF_JSON) is not None:
        return _carried(metadata[Keys.Tokenizer.HF_JSON], tokens)
    kind = metadata.get(Keys.Tokenizer.MODEL)
    types = metadata.get(Keys.Tokenizer.TOKEN_TYPE, [TokenType.NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ConvertError("metadata: tokens are not unique, or not as many as their types", GIVE_TOKENIZER)
    try:
        if kind == "gpt2":
            tokenizer, begins = _byte_level(metadata, tokens, types)
        elif kind == "llama":
            tokenizer, begins = sentencepiece(metadata, tokens, types, GIVE_TOKENIZER), True
        else:
            raise ConvertError(f"metadata '{Keys.Tokenizer.MODEL}' is {kind!r}; known: gpt2, llama", GIVE_TOKENIZER)
        _add_tokens(tokenizer, tokens, types)
    except ElmoeError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ConvertError(f"metadata '{Keys.Tokenizer.MERGES}' does not fit its tokens: {error}", GIVE_TOKENIZER) from error
    _surround(tokenizer, metadata, tokens, begins)
    return _compact(tokenizer.to_str())


def _compact(text: str) -> bytes:
    """A tokenizer.json with each merge as one string, in the older spelling: it loads in half the time."""
    data = json.loads(text)
    merges = data["model"]["merges"]
    if not any(" " in part for pair in merges for part in pair):
        data["model"]["merges"] = [" ".join(pair) for pair in merges]
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def _byte_level(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """A byte-level BPE, and whether its texts begin with a token where the file does not say."""
    name, merges = metadata.get(Keys.Tokenizer.PRE), metadata.get(Keys.Tokenizer.MERGES)
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ConvertError(f"metadata '{Keys.Tokenizer.PRE}' is {name!r}; known: {known}", GIVE_TOKENIZER)
    pre = PRE_TOKENIZERS[name]
    if not isinstance(merges, list) or not merges or not all(isinstance(text, str) for text in merges):
        found = "missing" if merges is None else "empty" if merges == [] else "not a list of texts"
        raise ConvertError(f"metadata '{Keys.Tokenizer.MERGES}' is {found}", GIVE_TOKENIZER)
    pairs = [tuple(text.split(" ")) for text in merges]
    wrong = next((text for text, pair in zip(merges, pairs, strict=True) if len(pair) != 2 or not all(pair)), None)
    if wrong is not None:
        raise ConvertError(f"metadata '{Keys.Tokenizer.MERGES}' has '{short(wrong, 40)}', not two tokens", GIVE_TOKENIZER)
    if len(pairs) == 1 and "".join(pairs[0]) not in set(tokens):
        pairs = []  # see idle_merge
    # Added tokens are in the model's own vocabulary too, or they would get other ids.
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != TokenType.UNUSED}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that are cut out of a text before anything else, with the ids that they have."""
    control = (TokenType.CONTROL, TokenType.UNKNOWN)
    for special, kinds in ((True, control), (False, (TokenType.USER_DEFINED,))):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in kinds and token
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _surround(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], begins: bool) -> None:
    """What every text begins and ends with. ``begins``: where the file does not say."""
    before, after = (
        [_check_id(metadata.get(key), len(tokens), f"the id of the {what}")] if metadata.get(flag, default) is True else []
        for flag, key, what, default in (
            (Keys.Tokenizer.ADD_BOS, Keys.Tokenizer.BOS_ID, "begin", begins),
            (Keys.Tokenizer.ADD_EOS, Keys.Tokenizer.EOS_ID, "end", False),
        )
    )
    if before or after:
        single = [*(tokens[index] for index in before), "$A", *(tokens[index] for index in after)]
        special = [(tokens[index], index) for index in dict.fromkeys([*before, *after])]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=None, special_tokens=special)


def _carried(text: Any, tokens: list[str]) -> bytes:
    """The tokenizer.json that a file carries, if its tokens are those of the file."""
    key = Keys.Tokenizer.HF_JSON
    try:
        tokenizer = load_tokenizer(str(text).encode(), f"metadata {key}", ConvertError)
    except ConvertError as error:
        raise ConvertError(str(error), GIVE_TOKENIZER) from error
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index >= len(tokens) or tokens[index] != token:
            raise ConvertError(f"metadata '{key}' and '{Keys.Tokenizer.LIST}' differ at token {index}", GIVE_TOKENIZER)
    return str(text).encode()
