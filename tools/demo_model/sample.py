"""Texts that a checkpoint writes. usage: sample.py CHECKPOINT [--prompt TEXT ...] [--seeds 2] [--temperature 0.7]"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from model import Model, load
from tokenizers import Tokenizer

PROMPTS = (
    "It was a fine morning in May, and the two sisters",
    "User: Hello! How are you today?\nAssistant:",
    "User: What is a volcano?\nAssistant:",
    "Chocolate Cake\nIngredients:\n",
    "def read_lines(path):",
)
END = 0


@torch.no_grad()
def scores_of(model: Model, ids: list[int]) -> torch.Tensor:
    """Scores of the next token."""
    kept: list[torch.Tensor] = []
    hook = model.norm.register_forward_hook(lambda _module, _inputs, output: kept.append(output[0, -1]))
    row = torch.tensor([ids])
    model(row, torch.full_like(row, -1))
    hook.remove()
    return kept[0] @ model.embedding.weight.T


def write(model: Model, ids: list[int], count: int, temperature: float, seed: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    ids = list(ids)
    for _ in range(count):
        chances = (scores_of(model, ids[-512:]) / temperature).softmax(-1)
        token = int(torch.multinomial(chances, 1, generator=random))
        if token == END:
            break
        ids.append(token)
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", nargs="+", default=PROMPTS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(arguments.checkpoint), Tokenizer.from_file(str(arguments.checkpoint / "tokenizer.json"))
    for prompt in arguments.prompt:
        for seed in range(arguments.seeds):
            ids = write(model, tokenizer.encode(prompt).ids, arguments.tokens, arguments.temperature, seed)
            print(f"--- seed {seed}\n{tokenizer.decode(ids)}\n", flush=True)


if __name__ == "__main__":
    main()
