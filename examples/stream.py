"""Print text as it is made; two streams in turns; tasks of asyncio served as one batch.

python examples/stream.py [STORE]
"""

import asyncio
import sys

import elmoe

model = elmoe.load(sys.argv[1] if len(sys.argv) > 1 else "demo")

print("The whale", end="")
for piece in model.stream("The whale", max_tokens=40):
    print(piece.text, end="", flush=True)
print("\n")

# Two streams: each step of the engine computes the next tokens of both. Closing one frees its memory at once.
with model.stream("The sea", max_tokens=500) as sea, model.stream("def f(x):", max_tokens=500) as code:
    for _ in range(6):
        print(repr(next(sea).text), "|", repr(next(code).text))
print()


async def tasks() -> None:
    """Requests of independent tasks come and go; whoever waits at the same time shares a batch."""
    prompts = ["The whale", "A prime number is", "SELECT name FROM"]
    answers = await asyncio.gather(*(model.agenerate(prompt, max_tokens=16) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"{prompt}{answer.text!r}")
    async for piece in model.astream("The sea", max_tokens=16):
        print(piece.text, end="", flush=True)
    print()


asyncio.run(tasks())
model.close()
