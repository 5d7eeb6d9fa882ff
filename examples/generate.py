"""Generate text: one prompt, several as a batch, several answers to one.

python examples/generate.py [STORE]
"""

import sys

import elmoe

with elmoe.load(sys.argv[1] if len(sys.argv) > 1 else "demo") as model:
    print(model.info)

    # A string gives one answer. Temperature 0, the default, takes the most likely token.
    answer = model.generate("The whale", max_tokens=40)
    print(f"The whale{answer.text}")
    print(f"({len(answer.token_ids)} tokens in {answer.statistics.steps} steps, ended by {answer.finish_reason})\n")

    # A list gives a list; the prompts are served as one batch.
    params = elmoe.SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=24, stop="\n\n")
    prompts = ["It is a truth universally acknowledged, that", "def read_file(path):\n", "SELECT name FROM"]
    for prompt, answer in zip(prompts, model.generate(prompts, params), strict=True):
        print(f"{prompt}{answer.text}\n")

    # Three answers to one prompt, and how likely its first token and the alternatives were.
    first = model.generate("The sea", params, n=3, logprobs=3)
    for answer in (first, *first.others):
        print(f"The sea{answer.text!r}")
    for token, logprob in first.top_logprobs[0]:
        print(f"  {model.decode([token])!r}: {logprob:.2f}")
