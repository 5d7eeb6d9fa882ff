"""A byte-level BPE and the shuffled token stream. usage: tokenise.py WORK [--tokenizer]

Writes WORK/tokenizer.json (kept where it exists, unless --tokenizer is given), WORK/tokens.bin (training) and
WORK/heldout*.bin. Token 0 ends every piece, and every answer of a conversation, so that the model ends there.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
from build_corpus import BETWEEN
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 8192
END = "<|endoftext|>"
PASSES = {"chat_chatterbot": 4, "recipes": 4, "wikipedia_vital": 2, "code_python": 2}
"""Times a source is in one epoch; once where it is not named."""
LARGEST = {
    "wordnet_glosses": 3_500_000, "docs_python": 5_500_000, "docs_sqlite": 2_000_000, "docs_postgres": 3_000_000,
    "code_python": 9_000_000, "code_networkx": 3_000_000, "code_django": 4_000_000, "code_sympy": 4_000_000,
    "bible_king_james": 2_000_000, "commentary_henry": 500_000, "speeches_state_of_the_union": 1_500_000,
}  # fmt: skip
"""Characters taken of a source. About a tenth of an epoch is recipes and a quarter code, which the first 13 million tokens,
with 6 and 12 % of them, had left weak."""


def read_pieces(file: Path) -> list[str]:
    """Pieces of a source, in an order of their own, up to its limit."""
    pieces = file.read_text(encoding="utf-8").strip("\n").split(BETWEEN)
    if file.stem.startswith("chat_"):
        pieces = [piece.replace("\nUser:", f"{END}\nUser:") for piece in pieces]
    limit = LARGEST.get(file.stem)
    if not limit:
        return pieces
    random.Random(file.stem).shuffle(pieces)
    total, taken = 0, []
    for piece in pieces:
        total += len(piece)
        if total > limit:
            break
        taken.append(piece)
    return taken


def train_tokenizer(pieces: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, pieces: list[str]) -> np.ndarray:
    parts = []
    for start in range(0, len(pieces), 512):
        for encoding in tokenizer.encode_batch(pieces[start : start + 512]):
            parts.append(np.array([*encoding.ids, 0], np.uint16))
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", action="store_true", help="train the tokenizer anew")
    arguments = parser.parse_args()
    work, pieces = arguments.work, []
    for file in sorted((work / "corpus").glob("*.txt")):
        taken = read_pieces(file)
        pieces += taken * PASSES.get(file.stem, 1)
        print(f"{file.stem:28} {sum(map(len, taken)) / 1e6:6.2f} M characters x {PASSES.get(file.stem, 1)}")
    random.Random(1).shuffle(pieces)
    path = work / "tokenizer.json"
    if arguments.tokenizer or not path.exists():
        train_tokenizer(pieces[: len(pieces) // 3]).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    tokens = encode(tokenizer, pieces)
    tokens.tofile(work / "tokens.bin")
    for file in work.glob("heldout*.txt"):
        encode(tokenizer, file.read_text(encoding="utf-8").split(BETWEEN)).tofile(file.with_suffix(".bin"))
    size = sum(len(piece.encode()) for piece in pieces)
    print(f"{len(tokens) / 1e6:.2f} M tokens of {size / len(tokens):.2f} bytes")


if __name__ == "__main__":
    main()
