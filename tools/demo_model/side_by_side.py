"""Texts of two stores beside each other, none selected. usage: side_by_side.py OLD NEW [--blind FOLDER]

Five prompts, four seeds, as Markdown. --blind writes FOLDER/texts.md, in which either store is A by chance, and
FOLDER/key.json, which says of each text which one is NEW's: for a reader who must not know.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import elmoe

PROMPTS = {
    "story": "It was a fine morning in May, and the two sisters",
    "talk": "User: Hello! How are you today?\nAssistant:",
    "explanation": "A volcano is",
    "recipe": "Chocolate Cake\nIngredients:\n-",
    "code": "def read_lines(path):",
}
SEEDS, TOKENS, BYTES = 4, 96, 320
"""BYTES: shown of a text, since the stores' tokens are of different sizes."""
SAMPLING = dict(temperature=0.7, top_p=0.95, repetition_penalty=1.1)


def texts_of(store: Path) -> list[str]:
    """Continuations, all seeds of the first prompt first."""
    with elmoe.load(store) as model:
        return [
            cut(model.generate(prompt, max_tokens=TOKENS, seed=seed, **SAMPLING).text)
            for prompt in PROMPTS.values()
            for seed in range(SEEDS)
        ]


def cut(text: str) -> str:
    """The beginning of a text, ended at a blank."""
    if len(text.encode()) <= BYTES:
        return text
    begin = text.encode()[:BYTES].decode(errors="ignore")
    return "".join(begin.rsplit(maxsplit=1)[:1]) + " ..."


def block(title: str, text: str) -> str:
    """A text as it is, whatever is in it."""
    fence = "~" * max(3, 1 + max(map(len, re.findall("~+", text)), default=0))
    return f"**{title}**\n\n{fence}text\n{text}\n{fence}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--blind", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    pairs = list(zip(texts_of(arguments.old), texts_of(arguments.new), strict=True))
    heads = [(kind, prompt, seed) for kind, prompt in PROMPTS.items() for seed in range(SEEDS)]
    coin, key, parts, blind = random.Random(), [], [], []
    for number, ((kind, prompt, seed), (old, new)) in enumerate(zip(heads, pairs, strict=True), 1):
        parts += [f"### {number}. {kind}, seed {seed}\n", block("old", prompt + old), block("new", prompt + new)]
        key.append(coin.choice("AB"))
        a, b = (new, old) if key[-1] == "A" else (old, new)
        blind += [f"### {number}. {kind}\n", block("A", prompt + a), block("B", prompt + b)]
    print("\n".join(parts))
    if arguments.blind is not None:
        arguments.blind.mkdir(parents=True, exist_ok=True)
        (arguments.blind / "texts.md").write_text("\n".join(blind), encoding="utf-8")
        (arguments.blind / "key.json").write_text(json.dumps(key))


if __name__ == "__main__":
    main()
