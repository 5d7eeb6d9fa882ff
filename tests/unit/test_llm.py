"""The Python API: answers, streams, chats, tasks and threads on one model, and every error by name."""

from __future__ import annotations

import asyncio
import gc
import math
import threading

import pytest

import elmoe
from elmoe.errors import BudgetError, NumericsError, RequestError, StoreError
from elmoe.trace import read_trace
from tests.templated import templated_store

WHALE = "The whale"


@pytest.fixture(scope="module")
def model():
    with elmoe.load("demo") as opened:
        yield opened


def idle(model) -> bool:
    """Nobody is served and every page of the cache is free."""
    engine = model.engine
    return not engine.has_work and engine.cache.free_pages == engine.cache.pages


def told(*arguments, error=RequestError, **named):
    """What a call is refused with, and the hint."""
    call, *rest = arguments
    with pytest.raises(error) as caught:
        call(*rest, **named)
    return f"{caught.value} | {caught.value.hint}"


# answers


def test_one_prompt_gives_one_answer_and_a_list_gives_a_list(model):
    one = model.generate(WHALE, max_tokens=12)
    assert isinstance(one, elmoe.Generation) and one.text and len(one.token_ids) == len(one.logprobs) <= 12
    assert one.prompt_token_ids == model.encode(WHALE)
    ids = list(model.encode(WHALE))
    assert model.generate(ids, max_tokens=12).token_ids == one.token_ids
    several = model.generate([WHALE, ids, "The sea"], max_tokens=12)
    assert [answer.text for answer in several[:2]] == [one.text, one.text] and len(several) == 3
    assert model.generate([], max_tokens=3) == []
    assert idle(model)


def test_statistics_are_of_the_answer_and_of_the_engine(model):
    answer = model.generate(WHALE, max_tokens=12, ignore_eos=True)
    facts = answer.statistics
    assert (facts.prompt_tokens, facts.tokens) == (len(model.encode(WHALE)), 12)
    assert 1 <= facts.steps <= 12 and 0 < facts.first_token_seconds <= facts.seconds
    assert facts.tokens_per_second is None or facts.tokens_per_second > 0
    assert model.statistics["committed_tokens"] == 12
    list(model.stream(WHALE, max_tokens=7, ignore_eos=True))
    assert model.statistics["committed_tokens"] == 7  # a new run of the engine


def test_alternatives_are_the_most_likely_tokens(model):
    answer = model.generate(WHALE, max_tokens=6, logprobs=4)
    assert len(answer.top_logprobs) == len(answer.token_ids)
    for token, logprob, likely in zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True):
        assert len(likely) == 4 and likely[0] == (token, logprob)  # greedy
        assert [value for _, value in likely] == sorted((value for _, value in likely), reverse=True)
    assert model.generate(WHALE, max_tokens=2).top_logprobs == ()


def test_a_seed_is_drawn_reported_and_repeats_the_answer(model):
    first = model.generate(WHALE, temperature=1.0, max_tokens=16)
    assert model.generate(WHALE, temperature=1.0, max_tokens=16, seed=first.seed).token_ids == first.token_ids
    assert model.generate(WHALE, temperature=1.0, max_tokens=16).token_ids != first.token_ids


def test_equal_prompts_of_a_call_draw_apart_and_equal_calls_agree(model):
    params = elmoe.SamplingParams(temperature=1.0, seed=5, max_tokens=16)
    call = [model.generate([WHALE, "The sea", WHALE, WHALE], params) for _ in range(2)]
    tokens = [[answer.token_ids for answer in answers] for answers in call]
    assert tokens[0] == tokens[1] and len({*tokens[0][:1], *tokens[0][2:]}) == 3
    assert model.generate(WHALE, params).token_ids == tokens[0][0]
    copies = model.generate(WHALE, params, n=3)
    assert [copies.token_ids, *(other.token_ids for other in copies.others)] == [tokens[0][0], *tokens[0][2:]]
    mixed = model.generate([WHALE, WHALE], params, n=2)
    four = [answer.token_ids for first in mixed for answer in (first, *first.others)]
    assert four[:3] == [tokens[0][0], *tokens[0][2:]] and len(set(four)) == 4


def test_keywords_change_single_fields_of_params(model):
    params = elmoe.SamplingParams(max_tokens=3, ignore_eos=True)
    assert len(model.generate(WHALE, params).token_ids) == 3
    assert len(model.generate(WHALE, params, max_tokens=5).token_ids) == 5


def test_stop_strings_end_the_text_and_are_not_part_of_it(model):
    whole = model.generate(WHALE, max_tokens=24)
    stop = whole.text[6:9]
    for given in (stop, [stop, "never in it"]):
        answer = model.generate(WHALE, max_tokens=24, stop=given)
        assert answer.finish_reason == "stop" and answer.text == whole.text[: whole.text.index(stop)]
    assert whole.finish_reason == "length"


def test_the_text_of_a_special_token_stops_at_its_id(model):
    """<|endoftext|> is no text of an answer: with ``ignore_eos`` the token itself has to end it."""
    end = model.encode("<|endoftext|>", special_tokens=False)
    assert len(end) == 1 and end[0] in model.spec.eos_tokens
    drawn = {"temperature": 2.5, "seed": 1, "max_tokens": 1500, "ignore_eos": True}
    free = model.generate(WHALE, **drawn)
    assert end[0] in free.token_ids  # or the test shows nothing
    stopped = model.generate(WHALE, stop="<|endoftext|>", **drawn)
    first = free.token_ids.index(end[0])
    assert stopped.finish_reason == "stop" and stopped.token_ids == free.token_ids[: first + 1]
    assert "<|" not in stopped.text


# streams


def test_pieces_make_up_the_answer(model):
    params = elmoe.SamplingParams(temperature=0.8, seed=3, max_tokens=40, logprobs=2)
    whole, pieces = model.generate(WHALE, params), list(model.stream(WHALE, params))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(token for piece in pieces for token in piece.token_ids) == whole.token_ids
    assert tuple(value for piece in pieces for value in piece.logprobs) == whole.logprobs
    assert tuple(item for piece in pieces for item in piece.top_logprobs) == whole.top_logprobs
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.finish_reason and len(pieces) > 2 and idle(model)


def test_pieces_hold_whole_characters(model):
    """Tokens drawn at random cut characters; no piece may show half of one that the whole text has."""
    params = elmoe.SamplingParams(temperature=3.0, seed=11, max_tokens=300, ignore_eos=True)
    pieces = [piece.text for piece in model.stream("naïve 東京 é", params)]
    whole = model.generate("naïve 東京 é", params).text
    assert "".join(pieces) == whole and any(ord(char) > 127 for char in whole)


def test_streams_in_turns_give_what_each_gives_alone(model):
    prompts = (WHALE, "def f(x):", "The sea")
    alone = [model.generate(prompt, max_tokens=20, seed=2, temperature=0.9).token_ids for prompt in prompts]
    streams = [model.stream(prompt, max_tokens=20, seed=2, temperature=0.9) for prompt in prompts]
    found = [[] for _ in prompts]
    open_ones = dict(enumerate(streams))
    while open_ones:
        for index, stream in list(open_ones.items()):
            piece = next(stream, None)
            if piece is None:
                del open_ones[index]
            else:
                found[index] += piece.token_ids
    assert [tuple(tokens) for tokens in found] == alone and idle(model)


def test_closing_a_stream_frees_its_memory_at_once_and_others_go_on(model):
    kept, left = model.stream(WHALE, max_tokens=30), model.stream("The sea", max_tokens=1000, ignore_eos=True)
    next(kept), next(left)
    held = model.engine.cache.free_pages
    left.close()
    assert model.engine.cache.free_pages > held
    assert list(left) == []
    rest = "".join(piece.text for piece in kept)
    assert model.generate(WHALE, max_tokens=30).text.endswith(rest) and idle(model)


def test_a_stream_that_nobody_holds_is_cancelled(model):
    next(model.stream(WHALE, max_tokens=1000, ignore_eos=True))
    gc.collect()
    assert idle(model)
    with model.stream(WHALE, max_tokens=1000, ignore_eos=True) as stream:
        next(stream)
    assert idle(model)


def test_generate_beside_an_open_stream(model):
    alone = model.generate([WHALE, "The sea"], max_tokens=10)
    with model.stream("def f(x):", max_tokens=50) as stream:
        first = next(stream)
        beside = model.generate([WHALE, "The sea"], max_tokens=10)
        pieces = [first, *stream]
    assert [answer.token_ids for answer in beside] == [answer.token_ids for answer in alone]
    assert "".join(piece.text for piece in pieces) == model.generate("def f(x):", max_tokens=50).text


def test_copies_can_be_streamed(model):
    params = elmoe.SamplingParams(temperature=1.0, seed=9, max_tokens=12, n=3)
    whole, texts = model.generate(WHALE, params), ["", "", ""]
    for piece in model.stream(WHALE, params):
        texts[piece.choice] += piece.text
    assert texts == [whole.text, *(other.text for other in whole.others)]


# tasks


def test_tasks_are_served_as_one_batch_and_get_what_each_gets_alone(model):
    prompts = [f"{WHALE} {index}" for index in range(6)]
    alone = [model.generate(prompt, max_tokens=12, seed=1, temperature=0.7).token_ids for prompt in prompts]

    async def together():
        widest = 0

        async def watch(prompt):
            nonlocal widest
            answer = asyncio.ensure_future(model.agenerate(prompt, max_tokens=12, seed=1, temperature=0.7))
            while not answer.done():
                widest = max(widest, len(model.engine.scheduler.running))
                await asyncio.sleep(0.0005)
            return answer.result().token_ids

        return await asyncio.gather(*(watch(prompt) for prompt in prompts)), widest

    found, widest = asyncio.run(together())
    assert found == alone and widest > 1 and idle(model)


def test_asynchronous_streams_and_their_cancellation(model):
    async def run():
        text = "".join([piece.text async for piece in model.astream(WHALE, max_tokens=12)])
        stream = model.astream(WHALE, max_tokens=1000, ignore_eos=True)
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(model.agenerate(WHALE, max_tokens=1500, ignore_eos=True))
        other = asyncio.create_task(model.agenerate("The sea", max_tokens=20))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return text, (await other).text

    text, other = asyncio.run(run())
    assert text == model.generate(WHALE, max_tokens=12).text and other == model.generate("The sea", max_tokens=20).text
    assert idle(model)


def test_a_refused_request_ends_its_task_alone(model):
    async def run():
        return await asyncio.gather(
            model.agenerate(WHALE, max_tokens=8), model.agenerate(WHALE, temperature=-1.0), return_exceptions=True
        )

    good, bad = asyncio.run(run())
    assert good.text and isinstance(bad, RequestError) and "temperature" in str(bad)


# chats


def test_chats_go_through_the_template_without_added_special_tokens(tmp_path):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is gravity?"}]
    with elmoe.load(templated_store(tmp_path)) as model:
        ids = model.chat_tokens(messages)
        end = model.encode("<|endoftext|>", special_tokens=False)
        assert ids[:1] == end and ids.count(end[0]) == 1  # the template's own, as bos_token
        assert model.decode(ids) == "system: Be short.\nuser: What is gravity?\nassistant:"
        answer = model.chat(messages, temperature=0.7, seed=1, max_tokens=12)
        assert answer.prompt_token_ids == ids
        assert (
            "".join(piece.text for piece in model.stream_chat(messages, temperature=0.7, seed=1, max_tokens=12))
            == answer.text
        )
        more = model.chat_tokens(messages, tools=[{"name": "search"}], shout="!")
        assert model.decode(more).endswith("tools: search\n!assistant:")
        for wrong in ("hello", [], [{"content": "x"}], ["x"], [{"role": 3, "content": "x"}]):
            assert "role" in told(model.chat, wrong)


def test_a_model_without_a_template_says_so(model):
    assert "'demo' has no chat template" in told(model.chat, [{"role": "user", "content": "x"}])


# loading


def test_budgets_are_read_with_their_units_and_change_no_text(model):
    plain = model.generate(WHALE, max_tokens=16, temperature=0.8, seed=4)
    for budget in ("24MiB", 24 << 20, "50%", 0.5, None):
        with elmoe.load("demo", fast_memory=budget, kv_memory="1MiB", batch=2, threads=1) as other:
            assert ("; enforced budget" in other.info) == (budget in ("24MiB", 24 << 20))
            found = other.generate(WHALE, max_tokens=16, temperature=0.8, seed=4)
            streamed = [
                token for piece in other.stream(WHALE, max_tokens=16, temperature=0.8, seed=4) for token in piece.token_ids
            ]
            assert (found.token_ids, found.logprobs) == (plain.token_ids, plain.logprobs)
            assert tuple(streamed) == plain.token_ids


def test_a_budget_in_bytes_that_is_only_accounted_streams_as_well():
    with elmoe.load("demo", fast_memory="24MiB", reader="memory") as other:
        assert "simulated tier" in other.info
        text = "".join(piece.text for piece in other.stream(WHALE, max_tokens=8))
        assert text == other.generate(WHALE, max_tokens=8).text


def test_options_come_as_an_object_or_as_keywords():
    options = elmoe.EngineOptions(mode="plain", batch=3)
    with elmoe.load("demo", options, draft_length=2) as other:
        chosen = other.engine.options
        assert (chosen.mode, chosen.batch, chosen.draft_length) == ("plain", 3, 2)
        assert other.spec.vocabulary > 0 and other.spec.max_positions == 2048


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
        ({"batch": "4"}, "the option batch is '4' | expected int, got str"),
        ({"batch": 65}, "batch is 65, allowed is 1..64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_options_that_are_refused(given, words):
    assert words in told(elmoe.load, "demo", **given)


def test_a_budget_below_the_minimum_and_a_store_that_is_not_there():
    assert "budget" in told(lambda: elmoe.load("demo", fast_memory="1MiB").generate("x"), error=BudgetError)
    assert "there is no store 'nowhere'" in told(elmoe.load, "nowhere", error=StoreError)


# requests that are refused


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
        ({"n": 65}, "copies is 65"),
        ({"logprobs": 21}, "alternatives is 21"),
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


def test_a_sequence_that_fails_raises_its_error_and_others_go_on(model):
    kept, failing = model.stream(WHALE, max_tokens=20), model.stream("The sea", max_tokens=20)
    pieces = [next(kept), next(failing)][:1]
    scheduler = model.engine.scheduler
    scheduler.fail(scheduler.running[1], NumericsError("a logit is not finite"))
    with pytest.raises(NumericsError, match="a logit is not finite"):
        list(failing)
    assert next(failing, None) is None
    pieces += kept
    assert "".join(piece.text for piece in pieces) == model.generate(WHALE, max_tokens=20).text and idle(model)


def test_an_interrupted_call_leaves_the_model_as_it_was(model, monkeypatch):
    engine = model.engine
    step, count = engine.step, 0

    def interrupted():
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return step()

    for call in (
        lambda: model.generate([WHALE, "The sea"], max_tokens=50),
        lambda: list(model.stream(WHALE, max_tokens=50)),
    ):
        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                call()
        assert idle(model) and model.generate(WHALE, max_tokens=4).text


def test_a_trace_is_recorded_of_one_call_alone(model, tmp_path):
    path = tmp_path / "run.trace"
    with model.stream(WHALE, max_tokens=50) as stream:
        next(stream)
        assert "a trace is recorded of one call alone" in told(model.generate, WHALE, trace=path)
    assert not list(tmp_path.iterdir())
    answer = model.generate(WHALE, max_tokens=9, ignore_eos=True, trace=path)
    trace = read_trace(path)
    computed = len(answer.prompt_token_ids) + len(answer.token_ids) - 1  # the last token is not computed
    assert trace.header.run["store"] == "demo" and trace.table.num_rows >= computed


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


def test_two_steps_from_two_threads_are_refused_and_do_no_harm(model, monkeypatch):
    engine, inside, leave = model.engine, threading.Event(), threading.Event()
    step = engine.step

    def slow():
        inside.set()
        assert leave.wait(30)
        return step()

    stream = model.stream(WHALE, max_tokens=6)
    monkeypatch.setattr(engine, "step", slow)
    found = []
    thread = threading.Thread(target=lambda: found.extend(stream))
    thread.start()
    assert inside.wait(30)
    message = told(model.generate, "The sea", max_tokens=3)
    other = model.stream("The sea", max_tokens=3)  # may be handed in, and cancelled, but not computed
    assert message == told(next, other)
    assert "generating in another thread" in message and "agenerate" in message
    leave.set()
    thread.join(30)
    monkeypatch.undo()
    assert "".join(piece.text for piece in found) == model.generate(WHALE, max_tokens=6).text and idle(model)


def test_unknown_names_of_the_package_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Modell'"):
        elmoe.Modell  # noqa: B018
    assert set(elmoe.__all__) <= set(dir(elmoe))
