"""Openings of texts and programs: prompts of many lengths for grids and benchmarks that need no prompt set."""

from __future__ import annotations

from collections.abc import Iterator

from elmoe.llm import Model

OPENINGS = (
    "It was a dark night and", "def solve(problem):\n    ", "The king said unto the people,", "CREATE TABLE users (",
    "To make the soup, take", "use std::collections::HashMap;\n", "A prime number is",
    "The sea was",
    "import numpy as np\n\n", "She had not been long in the house before", "The Second World War", "Q: What is a whale?\nA:",
    "class Node:\n    def __init__(self", "In mathematics, a group", "And it came to pass", 
    "SELECT count(*) FROM orders WHERE",
    "He walked", "x", "fn main() {", "Ingredients:\n- two eggs\n- flour\n",
)  # fmt: skip


def joined_openings(model: Model, count: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(prompt ids, tokens to generate): openings joined to many lengths, 1 to about 150 tokens."""
    for index in range(count):
        parts = [OPENINGS[(index * 7 + 3 * k) % len(OPENINGS)] for k in range(1 + (index * index) % 12)]
        ids = model.encode("\n".join(parts))
        yield ids[: 1 + (index * 37) % 150], 4 + (index * 5) % 21
