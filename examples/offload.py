"""A budget below the model's size: experts come from disk, drafts run on what is in memory, the text stays the same.

python examples/offload.py [STORE [BUDGET]]
"""

import sys

import elmoe

store = sys.argv[1] if len(sys.argv) > 1 else "demo"
budget = sys.argv[2] if len(sys.argv) > 2 else "16MiB"
texts = {}

print(f"{'mode':8} {'tokens/s':>9} {'accepted':>9} {'tokens/step':>12} {'read per token':>15}")
for mode in ("plain", "elastic"):
    # A throttle stands for a slow disk: the demo model would be read from the page cache of a fast one.
    with elmoe.load(store, fast_memory=budget, mode=mode, slow_bandwidth="200MB/s", reader="direct") as model:
        answer = model.generate("It is a truth universally acknowledged, that", max_tokens=64, ignore_eos=True)
        facts = model.statistics
    texts[mode] = answer.text
    rate = facts["acceptance_rate"]
    print(
        f"{mode:8} {facts['tokens_per_second']:9.1f} {'-' if rate is None else f'{rate:.0%}':>9}"
        f" {len(answer.token_ids) / answer.statistics.steps:12.2f}"
        f" {facts['read_bytes'] / facts['committed_tokens'] / 1e6:12.2f} MB"
    )
print("same text:", "yes" if texts["plain"] == texts["elastic"] else "NO")
