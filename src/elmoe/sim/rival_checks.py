"""Rivals and their drafts against what their own sources claim or measured: ratios, on machines of those sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import msgspec
import numpy as np

from elmoe.hw.cost import Cost
from elmoe.hw.machine import Machine, Multiply
from elmoe.models.load import load_model
from elmoe.models.sizes import ModelSizes
from elmoe.models.spec import Dense, GroupedAttention, LayerSpec, ModelSpec, Rope
from elmoe.schema.constants import Bandwidth, Capacity, OperationsPerByte, Ratio, Seconds, Throughput
from elmoe.schema.drafters import Drafters
from elmoe.schema.hardware import Hardware, NearMemory, Processor, load_hardware
from elmoe.schema.rivals import drafters_after, steps_of
from elmoe.schema.validation import Gain, Gains, load_validation
from elmoe.sim.routing import facts_of
from elmoe.sim.simulate import Priced, Simulation
from elmoe.sim.validation import Check, passes_of_experts
from elmoe.sim.workload import RoutingReplay
from elmoe.systems.forms import FormName, Odds, cost_of
from elmoe.systems.operations import operations

FIT = "fitted to, or stated by, the source of the check"
DATA_SETS = ((157, 67), (783, 209), (1886, 97), (1971, 17))
"""(positions of the prompt, tokens of the answer): HumanEval, ShareGPT, LongBench, LooGLE in H2-LLM's artifact."""
UTILISATION = {1: 0.71, 4: 0.45, 16: 0.52}
"""Of in-die NMP with units of 1 GHz, by batch size, in H2-LLM's artifact (dse/nmp_evaluator.py)."""

PACKAGE, PACKAGE_NEAR, PACKAGES = 76.8e9, 614.4e9, 2
"""Bytes/s of a package of LPDDR5X-PIM outside and beside its banks; how many are assumed (Samsung, Hot Chips 2026)."""
SAMSUNG_TOKENS, SAMSUNG_PLAIN, SAMSUNG_WITH, SAMSUNG_SECONDS = 320, 27.0, 81.3, 12.3
"""Positions of Samsung's run of Llama-3.1-8B; tokens/s without and with the chip's units; seconds with the prompt, without
them (the same)."""
H100_PRODUCTS, H100_BANDWIDTH, H100_CAPACITY = 989.4e12, 3352e9, 160e9
"""Operations/s with FP16, bytes/s and, of two, bytes of an H100, as in Duplex's simulator."""
SPECFORGE_PLAIN = 222.47
"""Tokens/s of plain decoding on two H100 (SpecForge issue 339)."""
SMALL_ACCEPTED, SMALL_DRAFT, RTX_3060 = 526 / 730, 5, 360e9
"""Accepted drafted tokens, drafted tokens of a step, and the card's bytes/s (llama.cpp issue 5877; NVIDIA)."""


@dataclass(frozen=True)
class RivalCheck(Check):
    """A check of a rival, and why it fails where it does."""

    source: str
    reason: str


def rival_checks() -> list[RivalCheck]:
    """Every row of the validation data, in order."""
    data = load_validation("rival_gains")
    assert isinstance(data, Gains)
    return [_checked(row) for row in data.rows]


def _checked(row: Gain) -> RivalCheck:
    return RivalCheck(row.statement, row.value, PREDICTIONS[row.name](), row.fitted, row.source, row.reason)


def _llama(layers: int, hidden: int, width: int, heads: int, head_dim: int, tied: bool, format: str,
           kv_heads: int = 8) -> ModelSizes:  # fmt: skip
    """A dense model like those of the Llama 3 family, by its published shapes; 128,256 tokens."""
    attention = GroupedAttention(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=Rope(theta=5e5, dimensions=head_dim)
    )
    layer = LayerSpec(attention=attention, feed_forward=Dense(width=width))
    spec = ModelSpec(
        family="llama", vocabulary=128256, hidden=hidden, norm_epsilon=1e-5, max_positions=131072, tied_embeddings=tied,
        layers=(layer,) * layers,
    )  # fmt: skip
    return ModelSizes(spec=spec, name="llama", source="config.json of Meta-Llama-3", formats={"matrices": format})


def _llama_8b(format: str) -> ModelSizes:
    return _llama(32, 4096, 14336, 32, 128, False, format)


def _pass(machine: Machine, model: ModelSizes, tokens: float, active: float, context: float, sequences: float) -> float:
    """Seconds of a pass of so many tokens of so many sequences, each over ``context`` cached positions."""
    passes = passes_of_experts(model, tokens, active, context, machine.token_rows)
    passes = replace(passes, cached=np.full(1, sequences * context))
    return float(cost_of(machine, operations(model, passes, machine)).latency.sum())


def _decode(machine: Machine, model: ModelSizes, batch: float, active: float, context: float) -> float:
    """Seconds of a pass of so many sequences, a token each."""
    return _pass(machine, model, batch, active, context, batch)


# Bank PIM of Samsung.


def _gemv() -> tuple[Cost, Cost]:
    """A product of 4096 x 4096 weights of 8 bits with one token, (read by the processor, beside the banks)."""
    machine, side = Machine(load_hardware("xpu_pim_published")), 4096
    count = np.full(1, float(side * side))
    return machine.read_main(count), machine.near(count, Multiply(side, side, np.ones(1), np.ones(1)))


def _pim_gemv() -> float:
    far, close = _gemv()
    return float(far.latency.sum() / close.latency.sum())


def _pim_energy() -> float:
    far, close = _gemv()
    return float(close.joules.sum() / far.joules.sum())


def _pim_llama() -> tuple[float, float]:
    """Seconds of a token, (read by the processor, beside the banks), of products alone."""
    model, seconds = _llama_8b("table4"), []
    for name in ("xpu", "xpu_pim_published"):
        preset = load_hardware(name)
        main = msgspec.structs.replace(preset.main, bandwidth=_known(Bandwidth, PACKAGES * PACKAGE))
        near = preset.near
        if near is not None:
            near = msgspec.structs.replace(near, bandwidth=_known(Bandwidth, PACKAGES * PACKAGE_NEAR))
        seconds.append(_decode(Machine(msgspec.structs.replace(preset, main=main, near=near)), model, 1, 0, SAMSUNG_TOKENS))
    return seconds[0], seconds[1]


def _pim_llama_rate() -> float:
    """Tokens per second without the chip's units, with the fixed time of the host that the rate with them leaves."""
    bare, near = _pim_llama()
    return 1 / (bare + (1 / SAMSUNG_WITH - near))


def _pim_llama_latency() -> float:
    """With the prompt's time as the published latency without units leaves it."""
    prompt = SAMSUNG_SECONDS - SAMSUNG_TOKENS / SAMSUNG_PLAIN
    return (prompt + SAMSUNG_TOKENS / _pim_llama_rate()) / (prompt + SAMSUNG_TOKENS / SAMSUNG_WITH)


# Logic-PIM of Duplex.


def _known(kind: type, value: float) -> Any:
    return kind(value, FIT, "derived")


def _duplex(near: bool) -> Machine:
    """An H100 as in Duplex's simulator, with or without the logic dies under its memory."""
    logic = load_hardware("xpu_logicpim_published")
    processor = Processor(
        throughput=_known(Throughput, H100_PRODUCTS), mac_energy=logic.compute.mac_energy,
    )  # fmt: skip
    main = msgspec.structs.replace(
        logic.main, bandwidth=_known(Bandwidth, H100_BANDWIDTH), capacity=_known(Capacity, H100_CAPACITY)
    )
    assert logic.near is not None
    times = logic.near.bandwidth.value / logic.main.bandwidth.value
    place = msgspec.structs.replace(logic.near, bandwidth=_known(Bandwidth, H100_BANDWIDTH * times)) if near else None
    return Machine(msgspec.structs.replace(logic, main=main, compute=processor, near=place))


def _duplex_mixtral() -> float:
    model = msgspec.structs.replace(load_model("mixtral-8x7b"), formats={"matrices": "bfloat16", "experts": "bfloat16"})
    found = []
    for batch in (32, 64, 128):
        for context in (256, 1024, 4096):
            bare, near = (_decode(_duplex(near), model, batch, 8, context) for near in (False, True))
            found.append(bare / near)
    return max(found)


# H2-LLM.


def _h2llm_machine(channels: int, bank: float, intensity: float, efficiency: float) -> Machine:
    """A machine of H2-LLM's artifact: 8 channels of 16 banks, some with units, and a processor of 128 T FP16
    multiply-accumulates that reaches 70 % of its rate and of 12.8 GB/s a channel."""
    nmp = load_hardware("xpu_nmp_published")
    assert nmp.near is not None
    near: NearMemory = msgspec.structs.replace(
        nmp.near, placement="main", bandwidth=_known(Bandwidth, channels * 16 * bank),
        intensity=_known(OperationsPerByte, intensity), efficiency=_known(Ratio, efficiency),
        interface=_known(Bandwidth, channels * 12.8e9),
    )  # fmt: skip
    main = msgspec.structs.replace(
        nmp.main, bandwidth=_known(Bandwidth, 8 * 12.8e9), efficiency=_known(Ratio, 0.7), refresh=None
    )
    processor = Processor(
        throughput=_known(Throughput, 0.7 * 256e12), mac_energy=nmp.compute.mac_energy,
    )  # fmt: skip
    features = msgspec.structs.replace(nmp.features, fast_dense=False)
    return Machine(msgspec.structs.replace(nmp, main=main, compute=processor, near=near, fast=None, features=features))


def _h2llm_models() -> tuple[ModelSizes, ...]:
    """OPT-6.7B, Llama-3-8B and PaLM-8B by the shapes of the artifact (config/*/shape.json); the two matrices of OPT's
    feed-forward count as three of two thirds the width."""
    opt = _llama(32, 4096, 16384 * 2 // 3, 32, 128, False, "bfloat16", kv_heads=32)
    palm = _llama(32, 4096, 16384, 16, 256, False, "bfloat16", kv_heads=1)
    return opt, _llama_8b("bfloat16"), palm


def _h2llm() -> float:
    gains = []
    for model, (batch, used) in product(_h2llm_models(), UTILISATION.items()):
        in_die = _h2llm_machine(8, 6.4e9, 2 * 16 / 6.4, used)
        hybrid = _h2llm_machine(6, 25.6e9, 2 * 8 * 16 * 0.6 / 25.6, 0.95)
        for prompt, answer in DATA_SETS:
            times = []
            for machine in (in_die, hybrid):
                first = _pass(machine, model, batch * prompt, 0, prompt / 2, batch)
                times.append(first + answer * _decode(machine, model, batch, 0, prompt + answer / 2))
            gains.append(times[0] / times[1])
    return float(np.exp(np.mean(np.log(gains))))


# Drafts.


@cache
def _qwen() -> tuple[ModelSizes, RoutingReplay]:
    model = msgspec.structs.replace(
        load_model("qwen3-30b-a3b"), formats={"matrices": "bfloat16", "experts": "bfloat16"}
    )  # fmt: skip
    return model, RoutingReplay(facts_of(model, "mt_bench"))


@cache
def _two_h100() -> Hardware:
    """Two H100 with a fixed time per layer that gives SpecForge's rate of plain decoding."""
    bare = load_hardware("rtx_pro_6000")
    main = msgspec.structs.replace(
        bare.main, bandwidth=_known(Bandwidth, 2 * H100_BANDWIDTH), capacity=_known(Capacity, H100_CAPACITY)
    )
    hardware = msgspec.structs.replace(bare, main=main, layer_overhead=None)
    plain = _priced(hardware, "ar", None)
    left = 1 / SPECFORGE_PLAIN - plain.seconds / plain.tokens
    return msgspec.structs.replace(hardware, layer_overhead=_known(Seconds, left / len(_qwen()[0].layers)))


def _priced(hardware: Hardware, form: FormName, tokens: int | None) -> Priced:
    """Decoding one sequence plainly, with a chain of 3 (``tokens`` 0), or with the measured tree of so many tokens."""
    model, replay = _qwen()
    drafters: Drafters = drafters_after(steps_of("published"))
    trees = tuple(tree for tree in drafters.eagle.trees if tree.tokens.value == tokens)
    drafters = msgspec.structs.replace(drafters, eagle=msgspec.structs.replace(drafters.eagle, trees=trees))
    simulation = Simulation(model, replay, drafters, steps=60)
    odds = Odds("preset", drafters.eagle.acceptance.value, "derived")
    return simulation.price(Machine(hardware), form, 1, odds, () if trees else (3,))


def _eagle_tokens(tokens: int) -> float:
    run = _priced(load_hardware("xpu"), "eagle", tokens)
    return run.tokens / run.workload.steps


def _eagle_speed(tokens: int) -> float:
    hardware = _two_h100()
    plain, drafted = _priced(hardware, "ar", None), _priced(hardware, "eagle", tokens)
    return drafted.tokens / drafted.seconds / (plain.tokens / plain.seconds)


def _small_model_speed() -> float:
    """Drafts and verification of a dense model by closed passes, on a machine with the bandwidth of an RTX 3060."""
    bare = load_hardware("rtx_pro_6000")
    main = msgspec.structs.replace(bare.main, bandwidth=_known(Bandwidth, RTX_3060))
    machine = Machine(msgspec.structs.replace(bare, main=main, layer_overhead=None))
    large, small = _llama_8b("nested8"), _llama(16, 2048, 8192, 32, 64, True, "nested8")
    plain, verified = (_pass(machine, large, tokens, 0, 512, 1) for tokens in (1, 1 + SMALL_DRAFT))
    drafted = SMALL_DRAFT * _pass(machine, small, 1, 0, 512, 1)
    return (1 + SMALL_ACCEPTED * SMALL_DRAFT) * plain / (drafted + verified)


PREDICTIONS: dict[str, Callable[[], float]] = {
    "pim_gemv": _pim_gemv, "pim_llama_rate": _pim_llama_rate, "pim_llama_latency": _pim_llama_latency,
    "pim_energy": _pim_energy, "duplex_mixtral": _duplex_mixtral, "h2llm": _h2llm,
    "eagle_chain_tokens": lambda: _eagle_tokens(0), "eagle_tree_tokens": lambda: _eagle_tokens(60),
    "eagle_experts": lambda: float(_priced(load_hardware("xpu"), "eagle", 60).workload.target.active.mean()),
    "eagle_chain_speed": lambda: _eagle_speed(0), "eagle_tree_speed": lambda: _eagle_speed(8),
    "eagle_large_tree_speed": lambda: _eagle_speed(60), "small_model_speed": _small_model_speed,
}  # fmt: skip
"""How each row of the data is predicted."""
