"""Record the routing of real text, then replay it: through cache policies, and on hardware that is not there.

python examples/trace.py [STORE [OUT]]
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

import elmoe
from elmoe.schema.hardware import load_hardware
from elmoe.sim.grid import Grid, run_grid
from elmoe.trace import read_facts, read_trace
from elmoe.trace.replacement import hit_rates_of
from elmoe.trace.summary import summarise

store = sys.argv[1] if len(sys.argv) > 1 else "demo"
path = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(mkdtemp()) / "run.trace"
prompts = ["The whale was", "A prime number is", "def read_file(path):\n", "SELECT name FROM"]

# A trace holds facts: which experts each token is routed to, and which draft tokens the target accepts.
with elmoe.load(store, fast_memory="50%", draft_length=4) as model:
    model.generate(prompts, temperature=0.8, seed=0, max_tokens=48, ignore_eos=True, trace=path)
summary = summarise(read_trace(path))
print(f"{path}: {summary['sequences']} sequences, acceptance {summary['acceptance']:.0%}")

# Replay 1: how often each cache policy would have found an expert, with a quarter of them in memory.
facts = read_facts(path)
for policy, rate in hit_rates_of(facts.chosen[facts.computed], facts.experts, facts.experts // 4).items():
    print(f"  {policy:8} {rate:.1%} hits")

# Replay 2: the same routing on described hardware.
systems = tuple(load_hardware(name) for name in ("xpu", "elmoe3d_8gb"))
for row in run_grid(Grid(systems, (store,), ("trace",), (1, 4), ("ar", "elastic"), trace=path)):
    print(f"  {row['system']:12} {row['form']:8} batch {row['batch']}: {row['tokens_per_second']:10.0f} tokens/s, simulated")
