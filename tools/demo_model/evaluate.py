"""Nats per byte of models on texts, so that tokenizers compare. usage: evaluate.py CHECKPOINT ... --text FILE ...

A text is cut at blanks into parts of about 700 bytes; every model reads a part behind an end-of-text token and is asked for
all of its bytes. Every n-th part is taken, so many that --parts remain. With --window, whole pieces of a text, an
end-of-text token behind each, are read in consecutive windows of so many tokens instead, without any left out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from build_corpus import BETWEEN
from model import Model, load
from tokenizers import Tokenizer

PART = 700


def parts_of(text: str, count: int) -> list[str]:
    """Parts of about ``PART`` characters from the whole text, evenly."""
    parts, start = [], 0
    while start < len(text):
        end = text.find(" ", start + PART)
        end = len(text) if end < 0 else end
        parts.append(text[start:end])
        start = end
    return parts[:: max(1, len(parts) // count)][:count]


@torch.no_grad()
def nats_per_byte(model: Model, tokenizer: Tokenizer, parts: list[str]) -> float:
    nats = size = 0.0
    for start in range(0, len(parts), 8):
        batch = parts[start : start + 8]
        rows = [[0, *encoding.ids] for encoding in tokenizer.encode_batch(batch)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        targets = torch.tensor([row[1:] + [-1] * (longest - len(row) + 1) for row in rows])
        nats += model(ids, targets)[0].item()
        size += sum(len(part.encode()) for part in batch)
    return nats / size


@torch.no_grad()
def in_windows(model: Model, tokenizer: Tokenizer, text: str, window: int) -> float:
    """Nats per byte of all pieces of a text; the first is an end of text."""
    pieces = [piece for piece in text.split(BETWEEN) if piece]
    ids = torch.tensor([0] + [id for piece in tokenizer.encode_batch(pieces) for id in (*piece.ids, 0)])
    nats = 0.0
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window + 1]
        nats += model(part[None, :-1], part[None, 1:])[0].item()
    return nats / sum(len(piece.encode()) for piece in pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--parts", type=int, default=200)
    parser.add_argument("--window", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = {file: file.read_text(encoding="utf-8") for file in arguments.text}
    for folder in arguments.checkpoints:
        model, tokenizer = load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
        for file, text in texts.items():
            began = time.time()
            if arguments.window:
                result = in_windows(model, tokenizer, text, arguments.window)
            else:
                result = nats_per_byte(model, tokenizer, parts_of(text, arguments.parts))
            print(f"{folder} {file.name}: {result:.4f} nats per byte ({time.time() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
