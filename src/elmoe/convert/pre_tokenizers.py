"""Pre-tokenizers by the names that GGUF files have for them (``tokenizer.ggml.pre``), as the models' own tokenizer.json
spells them: how text is cut before byte-level BPE. A name that is not listed is refused, never guessed: another cut gives
other ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer as Library

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
LLAMA3_PATTERN = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT_4O_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3_PATTERNS = (
    r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)  # fmt: skip
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Letters with a case, as DeepSeek's tokenizer lists them."""
_CHINESE_KOREAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK_LLM_PATTERNS = (
    "[\r\n]", f"\\s?[{_CASED}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$",
    _CHINESE_KOREAN,
)  # fmt: skip
DEEPSEEK_CODER_PATTERNS = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN)
_WHOLE = (QWEN2_PATTERN, LLAMA3_PATTERN, GPT_4O_PATTERN)
"""Patterns that match every character."""


@dataclass(frozen=True)
class PreTokenizer:
    """``patterns`` cut the text one after the other, then ``digits`` one by one, then GPT-2's pattern (``gpt2``), which the
    library has built in. ``nfc``: the text is normalised before. ``ignore_merges``: a piece that is a token is taken whole.
    ``add_bos``: a text begins with the token of the begin where a file does not say."""

    patterns: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> Library:
        """As an object of the ``tokenizers`` library."""
        steps: list[Library] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


_LLAMA3 = PreTokenizer((LLAMA3_PATTERN,), ignore_merges=True, add_bos=True)
_DIGITS = PreTokenizer(digits=True, gpt2=True)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(gpt2=True),
    "olmo": PreTokenizer(gpt2=True, nfc=True),
    "qwen2": PreTokenizer((QWEN2_PATTERN,), nfc=True),
    "deepseek-r1-qwen": PreTokenizer((QWEN2_PATTERN,), nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "glm4": PreTokenizer((LLAMA3_PATTERN,)),
    "chatglm-bpe": PreTokenizer((LLAMA3_PATTERN,)),
    "gpt-4o": PreTokenizer((GPT_4O_PATTERN,), ignore_merges=True),
    "deepseek-llm": PreTokenizer(DEEPSEEK_LLM_PATTERNS, digits=True),
    "deepseek-coder": PreTokenizer(DEEPSEEK_CODER_PATTERNS, digits=True),
    "deepseek-v3": PreTokenizer(DEEPSEEK_V3_PATTERNS),
}
"""By name; where several are alike, an export takes the first."""


def name_of(tokenizer: dict[str, Any]) -> str | None:
    """The name of a tokenizer.json's pre-tokenizer, normaliser and kind of merging; None if there is none. (A normaliser
    that is missing changes texts that are not normalised only, and is carried by the file's own tokenizer.json.)"""
    pre, normalizer = tokenizer["pre_tokenizer"] or {}, (tokenizer["normalizer"] or {}).get("type")
    if normalizer == "Sequence" and not tokenizer["normalizer"]["normalizers"]:
        normalizer = None
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    found = _read(steps)
    if found is None or normalizer not in (None, "NFC"):
        return None
    whole = bool(tokenizer["model"].get("ignore_merges"))
    for name, one in PRE_TOKENIZERS.items():
        same = (one.patterns, one.digits, one.gpt2, one.ignore_merges) == (*found, whole)
        if same and (one.nfc or normalizer is None):
            return name
    return None


def _read(steps: list[dict[str, Any]]) -> tuple[tuple[str, ...], bool, bool] | None:
    """(patterns, digits, gpt2) of a tokenizer.json's steps; None if they are others."""
    patterns, digits = [], False
    for step in steps[:-1]:
        kind, pattern = step.get("type"), step.get("pattern", {}).get("Regex")
        if kind == "Digits" and step.get("individual_digits") and not digits:
            digits = True
        elif kind == "Split" and pattern and _keeps_all(step) and not digits:
            patterns.append(pattern)
        else:
            return None
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    return tuple(patterns), digits, bool(last.get("use_regex", True))


def _keeps_all(step: dict[str, Any]) -> bool:
    """Whether a split leaves matches, and what lies between them, as pieces of their own; an inverted one removes what is
    between, which is nothing where the pattern matches every character."""
    behavior = step.get("behavior"), step.get("invert")
    return behavior == ("Isolated", False) or (behavior == ("Removed", True) and step["pattern"]["Regex"] in _WHOLE)
