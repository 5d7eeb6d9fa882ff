"""Texts for tokenizers: all scripts of Unicode, whitespace, numbers, code, and what is between."""

# ruff: noqa: E501, RUF001
from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from functools import cache

SENTENCES = (
    "All human beings are born free and equal in dignity and rights.", "Tous les êtres humains naissent libres et égaux.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren; sie sind's.", "Все люди рождаются свободными.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι.", "人人生而自由,在尊严和权利上一律平等。", "すべての人間は、生まれながらにして自由である。",
    "모든 인간은 태어날 때부터 자유롭다.", "يولد جميع الناس أحرارًا متساوين.", "כל בני האדם נולדו בני חורין.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता।", "মানুষ স্বাধীনভাবে জন্মগ্রহণ করে।", "மனிதர் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน", "ሰው ሁሉ ነፃ ሆኖ ይወለዳል", "Բոլոր մարդիկ ծնվում են ազատ։", "ყველა ადამიანი იბადება თავისუფალი.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng.", "İnsanlar hür doğarlar: ığdır İZMİR ǅ ǈ Ǳ ß ﬁ ŉ",
    "I'm, you're, he's, they'll, we've, I'd, can't; I'M YOU'RE HE'S THEY'LL; O'Neil's 'quoted' ''s",
    "HTTPServer getURLFromXML snake_case CONSTANT_NAME camelCase42 x86_64 v1.2.3-rc4+build",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 1e-10 0xFF ½ ② ⅷ ٣٤٥ १२३ 𝟘𝟙 ³²", "a\u0301e\u0308o\u0302 \u1e9b\u0323 \u2126\u212b",
    "🐋 👨‍👩‍👧‍👦 🏳️‍🌈 ❤️ 🇩🇪 👍🏽 ☃", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ !! ?! ... --- ///// \\\\ ##\n**", "€£¥ §¶ «»‹› „“” ‘’ – — … ¿¡ 。、！？「」（）",
    "\u200b\u200d\ufeff\u00ad\u2028\u2029\u0085\u00a0\u3000\u2003x", "\x00\x01\x1b[0m\x7f\ufffd\U0010ffff",
)  # fmt: skip
CODE = (
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }\r\n",
    'fn main() {\n    println!("{:?}", vec![1, 2]);\n}\n', "SELECT * FROM t WHERE a='x' AND b>=10;--c", "<div class=\"a\">&nbsp;</div>\n",
    "{\"k\": [1, 2.5, null, true], \"s\": \"\\u00e9\\n\"}", "$ curl -sSL https://example.org/a?b=c&d=%20 | sh -", "\\begin{equation} e^{i\\pi} \\end{equation}",
)  # fmt: skip
SPACES = (
    "", " ", "  ", "   a", "a   ", " a  b   c    d", "\n", "\n\n", "\n\n\n", " \n", "\n ", " \n \n ", "\t", "\t\tx", "a\tb \t c", "\r\n\r\n",
    "\r", "a\rb", "a \nb", "a\n b", "a  \n  b", "x\n\n\n\ny", "  \t \n", "a" + " " * 40 + "b", "\n" * 20, " " * 100,
)  # fmt: skip


@cache
def _assigned() -> tuple[str, ...]:
    """Characters of Unicode's first two planes."""
    return tuple(chr(code) for code in range(0x20000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co"))


def texts(added: tuple[str, ...] = (), seed: int = 0) -> Iterator[str]:
    """All of them, mixtures of them, and mixtures with added tokens."""
    yield from SENTENCES
    yield from CODE
    yield from SPACES
    rng, assigned = random.Random(seed), _assigned()
    for start in range(0, len(assigned), 97):  # every character, beside its neighbours
        yield "".join(assigned[start : start + 97])
    pool = (*SENTENCES, *CODE, *SPACES)
    for _ in range(400):
        yield "".join(rng.choice(assigned) + rng.choice(("", "", " ", "a", "\n", "1")) for _ in range(20))
        yield rng.choice(pool)[: rng.randrange(1, 40)] + rng.choice(pool)[rng.randrange(20) :]
    for token in added:
        first, second = rng.choice(pool), rng.choice(pool)
        yield from (token, f"{first}{token}{second}", f"a {token} b", f"{token}{token}\n{token}", token[:-1], f" {token}")
