"""The Python API: answers, chats, and how a model is loaded."""

from __future__ import annotations

import gc
import weakref

import pytest

import elmoe
from tests.refused import WHALE, idle, told
from tests.templated import templated_store, untemplated_store

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
    drawn = {"temperature": 1.2, "seed": 2, "max_tokens": 1500, "ignore_eos": True}
    free = model.generate(WHALE, **drawn)
    assert end[0] in free.token_ids  # or the test shows nothing
    stopped = model.generate(WHALE, stop="<|endoftext|>", **drawn)
    first = free.token_ids.index(end[0])
    assert stopped.finish_reason == "stop" and stopped.token_ids == free.token_ids[: first + 1]
    assert "<|" not in stopped.text


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


def test_messages_are_what_the_server_takes_or_refused(tmp_path):
    with elmoe.load(templated_store(tmp_path)) as model:
        text = model.chat_prompt([{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"text": "short."}]}])
        assert text.endswith("system: Be short.\nassistant:")
        for content in (None, 3, ["x"], [{"type": "image_url", "image_url": {"url": "x"}}]):
            for calls in ({}, {"tool_calls": [{"id": "1"}]}):  # which only an assistant has
                message = {"role": "user", "content": content, **calls}
                assert "message 0 has no text as its content" in told(model.chat, [message])
        assert "message 0 has no text" in told(model.chat, [{"role": "assistant", "content": None, "tool_calls": 5}])
        assert "wizard: x" in model.chat_prompt([{"role": "wizard", "content": "x"}])  # the template writes any role


def test_a_role_that_the_template_does_not_know_is_refused(model):
    wrong = told(model.chat, [{"role": "user", "content": "x"}, {"role": "wizard", "content": "x"}])
    assert "message 1 has the role 'wizard', which the chat template does not know" in wrong


def test_a_model_without_a_template_says_so(tmp_path):
    with elmoe.load(untemplated_store(tmp_path)) as model:
        assert "'untemplated' has no chat template" in told(model.chat, [{"role": "user", "content": "x"}])


def test_the_demo_model_answers_in_the_form_it_was_trained_in(model):
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": " Hi."}]
    messages.append({"role": "user", "content": "How are you?"})
    ids = model.chat_tokens(messages)
    assert model.decode(ids) == "User: Hello!\nAssistant: Hi.\nUser: How are you?\nAssistant:" and ids.count(0) == 1
    answer = model.chat(messages[:1], temperature=0, max_tokens=200)
    assert answer.finish_reason == "eos" and "User:" not in answer.text


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


def test_a_refused_batch_takes_nothing_from_the_next(tmp_path):
    """The requests before the one that is refused are given up: what they held is free again."""
    with elmoe.load("demo", batch=2, kv_memory=200_000) as model:
        alone = model.generate("Hi", max_tokens=30).token_ids
        with pytest.raises(elmoe.ElmoeError):
            model.generate(["Hi", "Hello " * 200], max_tokens=30)
        assert model.generate("Hi", max_tokens=30).token_ids == alone
        with pytest.raises(elmoe.ElmoeError):
            model.generate(["Hi", "Hi", "Hello " * 200], max_tokens=30)
        assert model.generate(["Hi", "Yes"], max_tokens=30)[0].token_ids == alone


@pytest.mark.parametrize(
    "options", [{}, {"fast_memory": 0.5}, {"fast_memory": 0.5, "reader": "direct", "prefix_cache": True}]
)
def test_the_memory_of_a_model_goes_with_its_last_reference(options):
    """Not with the next run of the collector of cycles: gigabytes would wait for it, beside those of the next model."""
    gc.collect()
    gc.disable()
    try:
        model = elmoe.load("demo", **options)
        model.generate(WHALE, max_tokens=4)
        next(iter(model.stream(WHALE, max_tokens=9)))
        kept = [weakref.ref(one) for one in (model, model.engine, model.engine.tier, model.engine.cache, model.reader)]
        del model
        assert [one() for one in kept] == [None] * len(kept)
    finally:
        gc.enable()
