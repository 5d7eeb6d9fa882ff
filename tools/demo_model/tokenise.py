"""A byte-level BPE of 4,096 tokens and the shuffled token stream. usage: tokenise.py WORK"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
PIECE = 8000
"""Characters of the pieces that are shuffled."""
LARGEST = 12_000_000
LARGEST_OF = {
    "wordnet_glosses": 6_000_000, "python_docs": 6_000_000, "code_python_sympy": 4_000_000, "postgres_docs": 4_000_000,
    "sqlite_docs": 3_000_000, "code_python_stdlib": 9_000_000,
}  # fmt: skip
"""Characters taken of a source, so that no source outweighs the others."""
TRAINING_PIECES = 2500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    pieces = []
    for file in sorted((work / "corpus").glob("*.txt")):
        text = file.read_text(encoding="utf-8", errors="ignore")[: LARGEST_OF.get(file.stem, LARGEST)]
        pieces += [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    random.Random(1).shuffle(pieces)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(pieces[:TRAINING_PIECES], trainer)
    tokenizer.save(str(work / "tokenizer.json"))
    tokens: list[int] = []
    for start in range(0, len(pieces), 256):
        for encoding in tokenizer.encode_batch(pieces[start : start + 256]):
            tokens += [*encoding.ids, 0]
    np.array(tokens, np.uint16).tofile(work / "tokens.bin")
    print(f"{len(tokens) / 1e6:.1f} M tokens")


if __name__ == "__main__":
    main()
