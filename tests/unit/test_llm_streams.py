"""The Python API: streams, tasks and threads on one model, and calls that end early."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
import weakref

import pytest

import elmoe
from elmoe.errors import NumericsError, RequestError
from elmoe.trace import read_trace
from tests.refused import WHALE, idle, told

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
    params = elmoe.SamplingParams(temperature=3.0, seed=12, max_tokens=300, ignore_eos=True)
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


def test_tasks_are_served_as_one_batch_and_get_what_each_gets_alone(model, monkeypatch):
    prompts = [f"{WHALE} {index}" for index in range(6)]
    alone = [model.generate(prompt, max_tokens=12, seed=1, temperature=0.7).token_ids for prompt in prompts]

    step, together = model.engine.step, []

    def watched():
        together.append(len(model.engine.scheduler.running) + len(model.engine.scheduler.waiting))
        return step()

    async def answers():
        return await asyncio.gather(*(model.agenerate(prompt, max_tokens=12, seed=1, temperature=0.7) for prompt in prompts))

    monkeypatch.setattr(model.engine, "step", watched)
    found = [answer.token_ids for answer in asyncio.run(answers())]
    assert found == alone and max(together) == len(prompts) and idle(model)


def test_asynchronous_streams_and_their_cancellation(model):
    async def run():
        text = "".join([piece.text async for piece in model.astream(WHALE, max_tokens=12)])
        stream = model.astream(WHALE, max_tokens=1000, ignore_eos=True)
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(model.agenerate(WHALE, max_tokens=1500, ignore_eos=True))
        other = asyncio.create_task(model.agenerate("The sea", max_tokens=300, ignore_eos=True))
        running = model.engine.scheduler.running
        while not other.done() and (len(running) < 2 or not all(one.output for one in running)):
            await asyncio.sleep(0)
        assert len(running) == 2 and not task.done() and not other.done()  # both write
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return text, (await other).text

    text, other = asyncio.run(run())
    assert text == model.generate(WHALE, max_tokens=12).text
    assert other == model.generate("The sea", max_tokens=300, ignore_eos=True).text
    assert idle(model)


def test_loops_that_have_ended_are_let_go_of(model):
    """A lock that somebody has waited for holds its loop."""
    loops = []

    async def run():
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await asyncio.gather(*(model.agenerate(WHALE, max_tokens=3) for _ in range(3)))

    for _ in range(3):
        asyncio.run(run())
    gc.collect()
    assert [loop() for loop in loops] == [None] * 3 and not model._turns


def test_a_refused_request_ends_its_task_alone(model):
    async def run():
        return await asyncio.gather(
            model.agenerate(WHALE, max_tokens=8), model.agenerate(WHALE, temperature=-1.0), return_exceptions=True
        )

    good, bad = asyncio.run(run())
    assert good.text and isinstance(bad, RequestError) and "temperature" in str(bad)


# calls that end early, or beside others


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


def test_two_steps_from_two_threads_are_refused_and_do_no_harm(model, monkeypatch):
    engine, inside, leave = model.engine, threading.Event(), threading.Event()
    step = engine.step

    def slow():
        inside.set()
        assert leave.wait(120)
        return step()

    stream = model.stream(WHALE, max_tokens=6)
    monkeypatch.setattr(engine, "step", slow)
    found = []
    thread = threading.Thread(target=lambda: found.extend(stream))
    thread.start()
    assert inside.wait(120)
    message = told(model.generate, "The sea", max_tokens=3)
    other = model.stream("The sea", max_tokens=3)  # may be handed in, and cancelled, but not computed
    assert message == told(next, other)
    assert "generating in another thread" in message and "agenerate" in message
    leave.set()
    thread.join(120)
    monkeypatch.undo()
    assert "".join(piece.text for piece in found) == model.generate(WHALE, max_tokens=6).text and idle(model)


def test_a_forked_process_is_told_to_load_the_model_itself():
    """Its threads that read experts are gone: it would wait for ever."""
    with elmoe.load("demo", reader="direct", fast_memory=0.5) as model:
        stream = model.stream(WHALE, max_tokens=5)
        text, told_here = next(stream).text, []
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()

        def child() -> None:
            for call in (lambda: model.generate(WHALE, max_tokens=5), lambda: model.stream(WHALE), lambda: next(stream)):
                try:
                    call()
                except RequestError as error:
                    theirs.send((str(error), error.hint))
            model.close()
            theirs.send("end")

        process = context.Process(target=child)
        process.start()
        while ours.poll(20) and (one := ours.recv()) != "end":
            told_here.append(one)
        process.join(20)
        assert process.exitcode == 0 and len(told_here) == 3
        assert all("loaded by another process" in message and "spawn" in hint for message, hint in told_here)
        assert text + "".join(piece.text for piece in stream) == model.generate(WHALE, max_tokens=5).text


def test_a_forked_process_lets_go_of_threads_that_it_does_not_have():
    """Reading threads wait on a condition variable, which a child can neither signal nor destroy."""
    kept = [elmoe.load("demo", fast_memory=0.5, reader="direct")]
    kept[0].generate(WHALE, max_tokens=4)

    def end():
        kept.clear()
        gc.collect()

    child = multiprocessing.get_context("fork").Process(target=end)
    child.start()
    child.join(30)
    ended = child.exitcode
    child.kill()
    assert ended == 0
    assert kept[0].generate(WHALE, max_tokens=4).text
    kept[0].close()
