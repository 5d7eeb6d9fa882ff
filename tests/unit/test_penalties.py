"""Bias and penalties: their formulas, the same answer however it is computed, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import click
import numpy as np
import pytest
from click.testing import CliRunner

import elmoe
from elmoe import bitslice, kernels
from elmoe.bitslice import History, SamplingParameters
from elmoe.cli.generate import command as generate
from elmoe.cli.main import cli
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.passes import Row
from elmoe.engine.request import RANGES, Request
from elmoe.engine.sequence import Proposal
from elmoe.errors import RequestError
from tests.tiny import TinyReader, tiny_spec

READER = TinyReader(tiny_spec())
PLAIN = EngineOptions(mode="plain", keep_kv_digest=True)
PENALTIES = SamplingParameters(
    presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.3, logit_bias=((7, -100.0), (3, 1.5))
)


def direct(logits, parameters: SamplingParameters, prompt, answer) -> np.ndarray:
    """The formula, id by id."""
    result = logits.copy()
    for token, bias in parameters.logit_bias:
        result[token] += np.float32(bias)
    for token in range(len(result)):
        x, count = result[token], np.float32(list(answer).count(token))
        if token in prompt or token in answer:
            r = np.float32(parameters.repetition_penalty)
            x = x / r if x > 0 else x * r
        x = x - count * np.float32(parameters.frequency_penalty)
        result[token] = x - np.float32(parameters.presence_penalty if count else 0)
    return result


@pytest.mark.parametrize(
    "parameters",
    [PENALTIES, replace(PENALTIES, repetition_penalty=1.0), SamplingParameters(repetition_penalty=0.7),
     SamplingParameters(presence_penalty=-2.0), SamplingParameters(logit_bias=((0, 2.0),))],
    ids=["all", "answer", "repetition", "presence", "bias"],
)  # fmt: skip
def test_values_are_those_of_the_formula(parameters):
    rng = np.random.default_rng(0)
    prompt, answer = [3, 3, 8, 20], rng.integers(0, 40, 60).tolist()
    history = History.of(parameters, prompt)
    for length in range(0, 60, 7):
        logits = rng.standard_normal(40).astype(np.float32) * 4
        before = logits.copy()
        behind = answer[length : length + 5]
        expected = direct(logits, parameters, prompt, answer[: length + 5])
        assert history.adjust(logits, behind).tobytes() == expected.tobytes()
        expected = direct(logits, parameters, prompt, answer[:length])
        assert history.adjust(logits).tobytes() == expected.tobytes() and (logits == before).all()
        for token in answer[length : length + 7]:
            history.push(token)


def test_neutral_values_change_nothing_and_overflow_stays_finite():
    assert History.of(SamplingParameters(0.8, seed=3), (1, 2)) is None
    history = History.of(SamplingParameters(repetition_penalty=0.001, presence_penalty=2.0), (0, 1))
    adjusted = history.adjust(np.array([3e38, -3e38, 1], np.float32))
    assert adjusted[0] == np.finfo(np.float32).max and abs(adjusted[1]) < 1e36 and adjusted[2] == 1


def requests(temperature: float) -> list[Request]:
    rng = np.random.default_rng(1)
    sampling = replace(PENALTIES, temperature=temperature, seed=5)
    changes = [{}, {"logit_bias": ()}, {"repetition_penalty": 1.0}, {"frequency_penalty": 2.0}, {"presence_penalty": -2.0}]
    return [
        Request(
            tuple(rng.integers(1, 97, 4 + 9 * i).tolist()), 25, replace(sampling, **change), ignore_eos=True,
            copies=1 + i % 2, alternatives=i % 2,
        )
        for i, change in enumerate(changes)
    ]  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_and_batches_change_nothing(temperature):
    reference, _ = Engine(READER, kernels, PLAIN).generate(requests(temperature))
    assert Engine(READER, bitslice, PLAIN).generate(requests(temperature)[:1])[0] == reference[:1]
    plain = [replace(one, sampling=SamplingParameters(temperature, seed=5)) for one in requests(temperature)]
    without = Engine(READER, kernels, PLAIN).generate(plain)[0]
    assert all(a.tokens != b.tokens for a, b in zip(reference, without, strict=True))
    for options in (
        EngineOptions(mode="plain", batch=3),
        EngineOptions(mode="elastic", fast_memory=0.0, draft_length=1),
        EngineOptions(mode="elastic", fast_memory=0.3, draft_length=4, batch=5),
        EngineOptions(mode="elastic", fast_memory=1.0, draft_length=8, batch=2),
    ):
        results, statistics = Engine(READER, kernels, replace(options, keep_kv_digest=True)).generate(requests(temperature))
        assert results == reference, options
        assert options.mode == "plain" or statistics.accepted > 0


def test_drafts_are_drawn_behind_what_they_drafted():
    """All experts and all bits: such a draft is the target, so a token is refused only if its penalties differed."""
    options = EngineOptions(mode="elastic", fast_memory=1.0, draft_length=6, draft_bits=8)
    rng = np.random.default_rng(2)
    sampling = replace(PENALTIES, temperature=0.7, seed=1, frequency_penalty=2.0)
    asked = [Request(tuple(rng.integers(1, 97, 120).tolist()), 40, sampling, ignore_eos=True)]
    _, statistics = Engine(READER, bitslice, options).generate(asked)
    assert statistics.accepted > 15 and statistics.rejected == 0


def test_branches_of_a_tree_count_their_own_tokens():
    engine = Engine(READER, bitslice, EngineOptions(mode="plain"))
    engine.add(Request(tuple(range(5, 23)), 20, replace(PENALTIES, temperature=0.9), ignore_eos=True))
    while not engine.scheduler.running or not engine.scheduler.running[0].output:
        engine.step()
    (one,) = engine.scheduler.running
    at = len(one.tokens) - 1
    engine.cache.reserve(one.entry, at + 8)
    last = Row(one, at, one.tokens[-1])
    # 40 and 41 follow the last token, 42 and 40 follow 41.
    branches = [(40,), (41,), (41, 42), (41, 40)]
    tree = [
        last,
        *(Row(one, at + len(b), b[-1], cell=at + i, parent=(0, 0, 2, 2)[i - 1]) for i, b in enumerate(branches, 1)),
    ]
    samples, taken = engine._passes.run("verify", tree, {}).samples, engine._passes.logits.copy()
    for branch, sample, logits in zip([(), *branches], samples, taken, strict=True):
        rows = [last, *(Row(one, at + i, token) for i, token in enumerate(branch, 1))]
        chain = engine._passes.run("verify", rows, {one: Proposal(list(branch))})
        assert sample == chain.samples[-1]
        adjusted = direct(logits, one.sampling, one.request.prompt, [*one.output, *branch])
        assert sample == bitslice.sample(logits, one.sampling, at + len(branch) + 1, adjusted)


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"presence_penalty": 2.1}, r"presence_penalty is 2.1, allowed is -2..2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"frequency_penalty": 2.1}, r"frequency_penalty is 2.1, allowed is -2..2"),
        ({"frequency_penalty": -2.1}, r"frequency_penalty is -2.1, allowed is -2..2"),
        ({"presence_penalty": -2.1}, r"presence_penalty is -2.1, allowed is -2..2"),
        ({"repetition_penalty": 101.0}, r"repetition_penalty is 101.0, allowed is 0.001..100"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, allowed is 0.001..100"),
        ({"logit_bias": ((97, 1.0),)}, "logit_bias has the token id 97"),
        ({"logit_bias": ((5, 101.0),)}, "logit_bias of token 5 is 101.0, allowed is -100..100"),
        ({"logit_bias": ((5, 1.0), (5, 2.0))}, "token id 5 twice"),
    ],
)
def test_values_out_of_range_are_named(changes, named):
    with pytest.raises(RequestError, match=named):
        Engine(READER, kernels, PLAIN).add(Request((1,), sampling=SamplingParameters(**changes)))


def test_the_command_line_has_the_engines_ranges_and_refuses_before_it_opens_a_model():
    ranges = {option.name: option.type for option in generate.params if isinstance(option.type, click.FloatRange)}
    assert {name: (kind.min or 0, kind.max) for name, kind in ranges.items()} == RANGES | {"top_p": (0, 1)}
    for value, told in (("-1", "-1.0 is not in the range 0<=x<=100"), ("nan", "'nan' is no number")):
        done = CliRunner().invoke(cli, ["generate", "no-such-model", "--prompt", "a", "--temperature", value])
        assert done.exit_code == 2 and f"'--temperature': {told}" in done.output


def test_the_python_api_takes_them(model):
    plain = model.generate("The whale", max_tokens=8)
    other = model.generate("The whale", max_tokens=8, logit_bias={plain.token_ids[0]: -100}, logprobs=1)
    assert other.token_ids[0] != plain.token_ids[0]
    assert other.top_logprobs[0][0][0] == plain.token_ids[0], "logprobs are those before the bias"
    plain, again = (model.generate("The whale", max_tokens=30, frequency_penalty=f, repetition_penalty=1.2) for f in (0, 1))
    assert again.token_ids != plain.token_ids and len(set(again.token_ids)) > len(set(plain.token_ids))
    for wrong in ({"5": 1.0}, {5: "x"}, [5, 1.0]):
        with pytest.raises(RequestError, match="the sampling parameter logit_bias"):
            elmoe.SamplingParams(logit_bias=wrong)
    with pytest.raises(RequestError, match="presence_penalty"):
        model.generate("The whale", presence_penalty=-3)
