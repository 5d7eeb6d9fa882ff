"""What the paper compares: the defaults of ``elmoe simulate`` and of the experiments.

Imports nothing, so that ``elmoe simulate --help`` is quick.
"""

SYSTEMS = ("xpu", "xpu_pim", "xpu_logicpim", "xpu_nmp", "hb_xpu", "elmoe3d_4gb", "elmoe3d_8gb")
"""Hardware presets; the first is the reference."""
MODELS = ("qwen3-30b-a3b", "glm-4.7-flash", "deepseek-v2-lite", "gpt-oss-20b")
PROMPTS = ("mt_bench", "gsm8k", "alpaca", "humaneval")
"""Locality presets, one per prompt set."""
OWN_LOCALITY = "model"
"""In place of a prompt set: the model's own locality, fitted to published numbers."""
RIVAL_SETS = ("generous", "published", "duplex")
"""How rivals are described (``sim/rivals.py``)."""
EXPERT_CACHES = ("none", "static", "lru")
"""What a rival's fast memory keeps of the experts."""
RIVAL_DRAFTS = ("none", "eagle", "all")
"""What rivals draft with."""
