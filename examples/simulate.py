"""Price a model on described hardware from Python: a preset, and the same with another bandwidth.

python examples/simulate.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from elmoe.schema.hardware import load_hardware, preset_text
from elmoe.sim.grid import Grid, run_grid
from elmoe.sim.result import odds_of

# A system is a short YAML file in which every number has a unit, a status and a source; this is a preset, changed.
with TemporaryDirectory() as folder:
    mine = Path(folder) / "mine.yaml"
    mine.write_text(preset_text("xpu").replace("name: xpu", "name: mine").replace("102.4 GB/s", "204.8 GB/s"))
    systems = (load_hardware("xpu"), load_hardware(str(mine)), load_hardware("elmoe3d_8gb"))

grid = Grid(
    systems,
    models=("qwen3-30b-a3b",),
    prompts=("model",),  # how local the routing is: as published of this model
    batches=(1, 8),
    forms=("ar", "elastic"),  # plain decoding, and elastic self-speculative decoding
    odds=(odds_of("demo"),),  # acceptance of drafts: as measured on the demo model
)
print(f"{'system':12} {'form':8} {'batch':>5} {'tokens/s':>9} {'speed-up':>9} {'mJ/token':>9} {'busiest':>16}")
for row in run_grid(grid):
    busiest = max(row["busy"], key=row["busy"].get)
    print(
        f"{row['system']:12} {row['form']:8} {row['batch']:5} {row['tokens_per_second']:9.1f} {row['speedup']:8.2f}x"
        f" {1000 * row['joules_per_token']['middle']:9.1f} {busiest:>16}"
    )
