"""The Python API: every error by name, with its mend."""

from __future__ import annotations

import asyncio
import math
import traceback
from fractions import Fraction

import numpy as np
import pytest

import elmoe
from elmoe.errors import BudgetError, KernelError, RequestError, StoreError
from tests.refused import WHALE, idle, told


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"fast_memry": "4GiB"}, "there is no option 'fast_memry' | did you mean 'fast_memory'?"),
        ({"xyz": 1}, "there is no option 'xyz' | there are mode, fast_memory"),
        ({"fast_memory": "4 elephants"}, "'4 elephants' is not an amount of memory"),
        ({"fast_memory": "25"}, "25%"),
        ({"kv_memory": "many"}, "not an amount of memory"),
        ({"slow_bandwidth": "fast"}, "not a bandwidth"),
        ({"mode": "elastc"}, "the option mode is 'elastc' | use plain, cache, elastic"),
        ({"split": "half"}, "use msb_first, whole_experts, auto"),
        ({"backend": "cuda"}, "the option backend is 'cuda' | use native, reference"),
        ({"reader": "disk"}, "the option reader is 'disk' | use auto, memory, direct"),
        ({"threads": 0}, "the option threads is 0 | use 1 to 64"),
        ({"store_dir": 5}, "the option store_dir is a int | give the path of a folder"),
        ({"batch": "4"}, "the option batch is '4' | expected int, got str"),
        ({"batch": 65}, "batch is 65, allowed is 1..64"),
        ({"options": {"batch": 1}}, "options is a dict | give elmoe.EngineOptions, or keywords"),
        ({"fast_memory": 1.01}, "fast_memory is 1.01 of the experts | give a share of 0.0 to 1.0"),
        ({"fast_memory": math.nan}, "fast_memory is nan of the experts"),
        ({"fast_memory": -5}, "fast_memory is -5 bytes | give an amount such as 4GiB"),
        ({"slow_bandwidth": 0.0, "reader": "direct"}, "slow_bandwidth is 0.0 bytes/s | give a bandwidth such as 1.7GB/s"),
        ({"slow_bandwidth": math.inf, "reader": "direct"}, "slow_bandwidth is inf"),
        ({"staging_experts": 0}, "staging_experts is 0 | use at least 1"),
        ({"commit_limit": 0}, "commit_limit is 0 | use at least 1"),
        ({"draft_offset": 16.5}, "draft_offset is 16.5, allowed is 0..16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_options_that_are_refused(given, words):
    assert words in told(elmoe.load, "demo", **given)


@pytest.mark.parametrize("store", [3, None, b"demo", ["demo"]], ids=repr)
def test_a_store_that_is_no_path_is_refused(store):
    assert f"the store is a {type(store).__name__} | give the path of a store, or 'demo'" in told(elmoe.load, store)


def test_a_traceback_tells_the_mend(model):
    with pytest.raises(RequestError) as caught:
        model.generate(WHALE, temprature=1.0)
    assert "hint: did you mean 'temperature'?" in "".join(traceback.format_exception(caught.value))


def test_an_offset_that_native_kernels_do_not_draft_with_is_named():
    with elmoe.load("demo", draft_offset=7.5, draft_length=2) as other:
        assert "integral offset within 0..16, not 7.5 | use --backend reference" in told(
            other.generate, WHALE, max_tokens=8, ignore_eos=True, error=KernelError
        )
        assert idle(other)


def test_a_budget_below_the_minimum_and_a_store_that_is_not_there():
    assert "budget" in told(lambda: elmoe.load("demo", fast_memory="1MiB").generate("x"), error=BudgetError)
    assert "there is no file or folder 'nowhere'" in told(elmoe.load, "nowhere", error=StoreError)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temprature": 1.0}, "there is no sampling parameter 'temprature' | did you mean 'temperature'?"),
        ({"temperature": "hot"}, "the sampling parameter temperature is 'hot' | expected float, got str"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1.0, allowed is 0..100"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 2.5}, "the sampling parameter max_tokens is 2.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"n": 65}, "n is 65, allowed is 1..64"),
        ({"logprobs": 21}, "logprobs is 21, allowed is 0..20"),
        ({"seed": -1}, "the seed is -1"),
        ({"seed": 1 << 63}, "2^63 - 1"),
        ({"seed": True}, "the sampling parameter seed is True"),
        ({"stop": 3}, "the sampling parameter stop is 3"),
        ({"stop": [""]}, "a stop string is empty"),
        ({"params": {"n": 2}}, "params is a dict"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_parameters_that_are_refused(model, given, words):
    assert words in told(model.generate, WHALE, **given)
    assert words in told(model.stream, WHALE, **given)
    assert idle(model)


def test_a_trace_is_a_path(model):
    assert "the trace is a int | give the path" in told(model.generate, WHALE, trace=5)
    assert idle(model)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (3, "the prompt is a int"),
        (None, "the prompt is a NoneType"),
        (b"bytes", "the prompt is a bytes"),
        ({"a": 1}, "the prompt is a dict"),
        ("", "the prompt is empty"),
        ("\ud800", "is not UTF-8"),
        ([1, "a"], "the prompt holds a str"),
        ([1, True], "the prompt holds a bool"),
        ([1, 10**6], "the prompt has the token id 1000000"),
        ([-1], "the prompt has the token id -1"),
        (["a", None], "the prompt is a NoneType"),
        ([[]], "the prompt is empty"),
        ("x " * 3000, "the context is 2048"),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_prompts_that_are_refused(model, prompt, words):
    assert words in told(model.generate, prompt)
    assert idle(model)


def test_more_of_the_cache_than_its_ceiling_is_refused_with_the_mend():
    with elmoe.load("demo", kv_memory="1MiB") as small:
        for call in (small.generate, small.stream):
            message = told(call, WHALE, max_tokens=2000, error=BudgetError)
            assert "KV cache" in message and "kv-memory" in message
        assert small.generate(WHALE, max_tokens=4).text and idle(small)


def test_an_unknown_request_is_refused_by_the_engine(model):
    assert "there is no request 12345" in told(model.engine.abort, 12345)


def test_a_closed_model_says_so():
    model = elmoe.load("demo")
    open_stream = model.stream(WHALE, max_tokens=100)
    next(open_stream)
    assert "closed" not in repr(model)
    model.close()
    model.close()
    assert "closed" in repr(model)
    assert "the model 'demo' is closed" in told(next, open_stream)
    for call in (model.generate, model.stream):
        assert "the model 'demo' is closed | load it again" in told(call, WHALE)
    assert "is closed" in told(model.chat, [{"role": "user", "content": "x"}])
    assert "is closed" in told(asyncio.run, model.agenerate(WHALE))
    assert model.decode(model.encode(WHALE)) == WHALE


def test_unknown_names_of_the_package_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Modell'"):
        elmoe.Modell  # noqa: B018
    assert set(elmoe.__all__) <= set(dir(elmoe))


def test_numbers_of_numpy_are_numbers():
    taken = elmoe.SamplingParams(temperature=np.float32(0.7), top_k=np.int64(3), top_p=np.float64(0.5))
    assert taken == elmoe.SamplingParams(temperature=float(np.float32(0.7)), top_k=3, top_p=0.5)
    assert {type(value) for value in (taken.temperature, taken.top_k, taken.top_p)} == {float, int}
    with pytest.raises(RequestError, match="the sampling parameter max_tokens"):
        elmoe.SamplingParams(max_tokens=np.float32(2.5))


def test_numbers_of_numpy_are_numbers_in_containers_and_prompts(model):
    taken = elmoe.SamplingParams(logit_bias={np.int64(5): np.float32(1)})
    assert taken.logit_bias == {5: 1.0} and {type(one) for pair in taken.logit_bias.items() for one in pair} == {int, float}
    ids = [int(one) for one in model.encode(WHALE)]
    texts = [model.generate(one, max_tokens=2, temperature=0).text for one in (list(map(np.int64, ids)), ids)]
    assert texts[0] == texts[1]
    assert "the option threads is 65" in told(elmoe.load, "demo", threads=np.int64(65))


@pytest.mark.parametrize(
    "given",
    [{"max_tokens": np.array([5])}, {"max_tokens": np.longdouble(2.5)}, {"max_tokens": Fraction(5, 2)},
     {"top_k": np.array(1)}, {"temperature": np.complex64(1)}, {"ignore_eos": np.datetime64("2020-01-01")},
     {"seed": np.array([1, 2])},
     {"json_object": np.array(["a"])}, {"stop": np.array([1])}, {"logit_bias": np.array(1)}],
    ids=repr,
)  # fmt: skip
def test_what_is_no_plain_data_is_refused_by_name(model, given):
    (name,) = given
    assert f"the sampling parameter {name} is " in told(lambda: elmoe.SamplingParams(**given))
    assert f"the sampling parameter {name} is " in told(model.generate, WHALE, **given) and idle(model)


@pytest.mark.parametrize("name", ["mode", "split", "draft_bits", "fast_memory", "batch", "draft_length", "draft_rescale"])
def test_options_that_are_no_plain_data_are_refused_by_name(name):
    for value in (np.array(2), np.array([2]), np.longdouble(1), np.datetime64("2020-01-01")):
        assert f"the option {name} is " in told(elmoe.load, "demo", **{name: value})
    assert "the option residency is " in told(elmoe.load, "demo", residency=np.array(1))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_model_serves_on_after_a_request_that_could_not_be_taken_in(error, monkeypatch):
    from elmoe.engine import decoder

    with elmoe.load("demo", batch=2) as model:
        before = model.generate(WHALE, max_tokens=5).text
        with monkeypatch.context() as patched:
            patched.setattr(decoder, "tables_of", lambda *_: (_ for _ in ()).throw(error))
            with pytest.raises(error):
                model.generate("The sea " * 40, max_tokens=900)
        assert idle(model) and model.generate(WHALE, max_tokens=5).text == before
