"""The wire format: answers, streams, and refusals that name the field."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import elmoe
from elmoe.server.app import create_app
from elmoe.server.schemas import ChatCompletion, Completion, ErrorBody
from elmoe.server.settings import Settings
from tests.server.waiting import SCOPE, gated, reached

NAME = re.compile(r"elmoe_\w+")
CHAT = {"model": "whale", "messages": [{"role": "user", "content": "What is a whale?"}], "max_tokens": 12, "temperature": 0}
TEXT = {"model": "whale", "prompt": "The whale", "max_tokens": 12, "temperature": 0}


def post(api, path, body):
    return api.post(path, json=body)


def events(response):
    """The events of a stream, without the last."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert response.headers["content-type"].startswith("text/event-stream") and lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_is_what_the_model_writes(api, model):
    answer = Completion.model_validate(post(api, "/v1/completions", TEXT).json())
    alone = model.generate("The whale", max_tokens=12)
    assert answer.choices[0].text == alone.text and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(alone.prompt_token_ids), 12)


def test_a_chat_is_what_the_model_writes(api, model):
    answer = ChatCompletion.model_validate(post(api, "/v1/chat/completions", CHAT).json())
    assert answer.choices[0].message.content == model.chat(CHAT["messages"], max_tokens=12).text
    shouting = CHAT | {"chat_template_kwargs": {"shout": "LOUD"}}
    loud = post(api, "/v1/chat/completions", shouting).json()["choices"][0]["message"]["content"]
    assert loud == model.generate(model.chat_tokens(CHAT["messages"], shout="LOUD"), max_tokens=12).text


def test_all_sampling_parameters_reach_the_engine(api, model):
    sampling = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 7}
    answer = post(api, "/v1/completions", TEXT | sampling | {"n": 3, "logprobs": 2, "max_tokens": 20}).json()
    alone = model.generate("The whale", n=3, logprobs=2, max_tokens=20, **sampling)
    together = [alone, *alone.others]
    assert [choice["text"] for choice in answer["choices"]] == [one.text for one in together]
    assert [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]] == [list(one.logprobs) for one in together]
    assert answer["seed"] == 7 and answer["usage"]["completion_tokens"] == 60
    assert answer["usage"]["prompt_tokens"] == len(alone.prompt_token_ids)
    first = answer["choices"][0]["logprobs"]
    assert "".join(first["tokens"]) == alone.text and len(first["top_logprobs"][0]) == 2
    assert first["text_offset"][1] == len(first["tokens"][0])


def test_a_seed_that_was_drawn_is_told_and_repeats(api):
    body = TEXT | {"temperature": 1.5, "max_tokens": 16}
    drawn = post(api, "/v1/completions", body).json()
    again = post(api, "/v1/completions", body | {"seed": drawn["seed"]}).json()
    assert drawn["choices"] == again["choices"]


def test_stop_strings_and_special_tokens_end_a_text(api, model):
    text = model.generate("The whale", max_tokens=60).text
    word = text.split()[3]
    answer = post(api, "/v1/completions", TEXT | {"max_tokens": 60, "stop": [word, "<|endoftext|>"]}).json()["choices"][0]
    assert answer["text"] == text[: text.index(word)] and answer["finish_reason"] == "stop"


@pytest.mark.parametrize("several", [1, 2])
def test_a_stream_is_the_whole_answer_in_pieces(api, several):
    body = CHAT | {"n": several, "seed": 3, "temperature": 0.7, "logprobs": True, "top_logprobs": 2, "max_tokens": 24}
    whole = post(api, "/v1/chat/completions", body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = events(post(api, "/v1/chat/completions", body | options))
    assert last["choices"] == [] and last["usage"] == whole["usage"] and all(piece["usage"] is None for piece in pieces)
    for choice in whole["choices"]:
        own = [one for piece in pieces for one in piece["choices"] if one["index"] == choice["index"]]
        assert "".join(one["delta"]["content"] for one in own) == choice["message"]["content"]
        assert [entry for one in own if one["logprobs"] for entry in one["logprobs"]["content"]] == choice["logprobs"][
            "content"
        ]
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + ["length"]
        assert [one["delta"].get("role") for one in own] == ["assistant"] + [None] * (len(own) - 1)


def test_a_stream_of_several_prompts(api):
    body = TEXT | {"prompt": ["The whale", "The sea", "A ship"]}
    whole = post(api, "/v1/completions", body).json()
    pieces = events(
        post(api, "/v1/completions", body | {"stream": True, "stream_options": {"continuous_usage_stats": True}})
    )
    texts = ["".join(one["text"] for p in pieces for one in p["choices"] if one["index"] == index) for index in range(3)]
    assert texts == [choice["text"] for choice in whole["choices"]] and len(set(texts)) == 3
    assert pieces[-1]["usage"] == whole["usage"]


def test_progress_of_a_prompt_is_told(store):
    """A chunk of the prompt is computed once the client has been told of the one before."""
    body = TEXT | {"prompt": "The whale and the sea. " * 100, "stream": True, "return_progress": True}
    told = []

    async def ask(app, gate):
        asked = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            if not asked:
                await asyncio.Event().wait()
            return asked.pop()

        async def send(message):
            for line in message.get("body", b"").decode().splitlines():
                if "prompt_progress" in line:
                    told.append(json.loads(line[6:])["prompt_progress"])
                    gate.release()

        gate.release()
        answer = asyncio.ensure_future(app(dict(SCOPE), receive, send))
        await reached(lambda: told and told[-1]["processed"] + 64 >= told[-1]["total"])
        gate.release(100)
        await answer

    with (
        elmoe.load(store, prefill_chunk=64) as model, TestClient(create_app(model, Settings("whale"))) as api,
        gated(model.engine) as gate,
    ):  # fmt: skip
        api.portal.call(ask, api.app, gate)
    total = told[0]["total"]
    assert total > 300 and [one["processed"] for one in told] == list(range(64, total, 64))


def test_tokens_and_texts(api, model):
    told = post(api, "/tokenize", {"content": "The whale"}).json()
    assert told["tokens"] == list(model.encode("The whale", False)) and told["count"] == len(told["tokens"])
    assert post(api, "/detokenize", {"tokens": told["tokens"]}).json() == {"content": "The whale"}
    chat = post(api, "/tokenize", {"messages": CHAT["messages"]}).json()["tokens"]
    assert chat == list(model.chat_tokens(CHAT["messages"]))
    assert post(api, "/tokenize", {"content": ""}).json()["tokens"] == []


def test_what_is_served(api, model):
    (card,) = api.get("/v1/models").json()["data"]
    assert card["id"] == "whale" and card["max_model_len"] == model.spec.max_positions
    assert api.get("/v1/models/whale").json() == card and api.get("/v1/models/other").status_code == 404
    props = api.get("/props").json()
    assert props["slots"] == 16 and props["chat_template"] == model.reader.chat_template()
    assert api.get("/health").json() == {"status": "ok"}


UNKNOWN, VALUE = "unknown_parameter", "invalid_value"
PART = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
CALLS = {"role": "assistant", "content": "x", "tool_calls": []}
REFUSED = [
    ({"modl": "x"}, "modl", UNKNOWN),
    ({"model": "other"}, "model", "model_not_found"),
    ({"model": 1}, "model", VALUE),
    ({"messages": []}, "messages", VALUE),
    ({"messages": None}, "messages", VALUE),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", VALUE),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "unsupported_value"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content", VALUE),
    ({"messages": [CALLS]}, "messages.0.tool_calls", "unsupported_parameter"),
    ({"messages": PART}, "messages.0.content.0.type", "unsupported_value"),
    ({"messages": [{"role": "user", "content": "sea " * 2000}]}, "messages", "context_length_exceeded"),
    ({"tools": []}, "tools", "unsupported_parameter"),
    ({"temperature": "hot"}, "temperature", VALUE),
    ({"temperature": -1}, "temperature", VALUE),
    ({"temperature": True}, "temperature", VALUE),
    ({"temperature": 1e-5}, "temperature", VALUE),
    ({"top_p": 0}, "top_p", VALUE),
    ({"top_k": 1.5}, "top_k", VALUE),
    ({"max_tokens": 0}, "max_tokens", VALUE),
    ({"n": 9}, "n", VALUE),
    ({"n": 65}, "n", VALUE),
    ({"stop": ["a", ""]}, "stop.1", VALUE),
    ({"stop": ["a"] * 17}, "stop", VALUE),
    ({"seed": 1 << 64}, "seed", VALUE),
    ({"top_logprobs": 2}, "top_logprobs", VALUE),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", VALUE),
    ({"stream_options": {"include_usage": True}}, "stream_options", VALUE),
    ({"stream": True, "stream_options": {"include": True}}, "stream_options.include", UNKNOWN),
    ({"logit_bias": {"x": 1}}, "logit_bias", VALUE),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", VALUE),
    ({"logit_bias": {"8192": 1}}, "logit_bias", VALUE),
    ({"response_format": {"type": "xml"}}, "response_format.type", VALUE),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", VALUE),
    ({"store": True}, "store", VALUE),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param", "code"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named(api, change, param, code):
    response = post(api, "/v1/chat/completions", CHAT | change)
    error = ErrorBody.model_validate(response.json()).error
    assert response.status_code == (404 if code == "model_not_found" else 400) and error.type.endswith("_error")
    assert (error.param, error.code) == (param, code), error.message


def test_an_answer_can_be_sent_back_as_clients_keep_it(api):
    kept = {"role": "assistant", "content": "Hi.", "refusal": None, "tool_calls": None, "function_call": None, "audio": None}
    turns = [{"role": "user", "content": "Hello!"}, kept, {"role": "user", "content": "And?"}]
    bare = [turns[0], {"role": "assistant", "content": "Hi."}, turns[2]]
    answers = [post(api, "/v1/chat/completions", CHAT | {"messages": one, "seed": 1}).json() for one in (turns, bare)]
    assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["usage"] == answers[1]["usage"]


def test_a_prompt_that_is_too_long_says_by_how_much(api):
    response = post(api, "/v1/completions", TEXT | {"prompt": [5] * 1510})
    assert "1510 tokens, 10 more than the 1500" in response.json()["error"]["message"]
    assert (
        post(api, "/v1/completions", TEXT | {"prompt": "x" * 900_000}).json()["error"]["code"] == "context_length_exceeded"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stop": ["a"] * 17}, "list should have at most 16 items"),
        ({"prompt": [-1]}, "input should be greater than or equal to 0"),
        ({"prompt": ["a", None]}, "prompt.1 is null: input should be a valid string"),
        ({"echo": True}, "echo is true: input should be false"),
        ({"best_of": 2}, "best_of is 2: input should be null"),
        ({"logit_bias": {"05": 1.0}}, "a key is no token id"),
    ],
)
def test_what_is_wrong_is_told_of_the_type_that_was_given_in_words_of_json(api, change, told):
    response = api.post("/v1/completions", json={"model": "whale", "prompt": "a"} | change)
    assert response.status_code == 400 and told in response.json()["error"]["message"], response.text


@pytest.mark.parametrize("prompt", ["", [], [-1], [8192], [1, "a"], [[]], [[1], "a"], {}, None, 5])
def test_prompts_that_are_none(api, prompt):
    response = post(api, "/v1/completions", TEXT | {"prompt": prompt})
    assert response.status_code == 400 and response.json()["error"]["param"].startswith("prompt")


JSON = {"content-type": "application/json"}
BODIES = [
    (b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b"\xff\xfe", 400), (b'{"model": NaN}', 400),
    (b'{"model": "whale", "model": "whale", "prompt": "x"}', 400), (b"[" * 200_000, 400), (b'{"a":' * 100_000, 400),
    (b'{"model": "whale", "prompt": "\\ud800"}', 400), (b'{"seed": ' + b"9" * 10_000 + b"}", 400), (b" " * (2 << 20), 413),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status"), BODIES, ids=lambda value: str(value)[:20])
def test_bodies_that_are_no_requests(api, body, status):
    response = api.post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == status and ErrorBody.model_validate(response.json())


def test_forms_and_other_paths_and_methods(api):
    assert api.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert api.get("/v1/nothing").json()["error"]["message"] == "there is no /v1/nothing"
    assert api.get("/v1/completions").status_code == 405


def test_a_template_that_refuses(tmp_path):
    from tests.templated import templated_store

    store = templated_store(tmp_path, "{{ raise_exception('no ' + messages[0].role) }}")
    with elmoe.load(store) as model, TestClient(create_app(model, Settings("whale"))) as api:
        error = post(api, "/v1/chat/completions", CHAT).json()["error"]
    assert error["param"] == "messages" and "no user" in error["message"]


def test_penalties_and_grammars_are_passed_on_or_refused(api):
    """Never taken without effect."""
    from dataclasses import fields

    from elmoe.generation import SamplingParams

    known = {field.name for field in fields(SamplingParams)}
    for change in (
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.5},
        {"repetition_penalty": 1.5},
        {"logit_bias": {"5": 5}},
    ):
        (name,) = change
        response = post(api, "/v1/chat/completions", CHAT | change)
        assert response.status_code == (200 if name in known else 400), response.text
        assert name in known or response.json()["error"]["param"] == name
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "logit_bias": {}}
    plain = post(api, "/v1/chat/completions", CHAT | {"response_format": {"type": "text"}} | neutral)
    assert plain.json()["choices"] == post(api, "/v1/chat/completions", CHAT).json()["choices"]


SCHEMA = {
    "type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"], "additionalProperties": False,
}  # fmt: skip


def test_answers_of_a_schema(api, model):
    wanted = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "whale", "schema": SCHEMA}},
        "max_tokens": 60,
    }
    answer = post(api, "/v1/chat/completions", CHAT | wanted).json()["choices"][0]
    assert set(json.loads(answer["message"]["content"])) == {"size"} and answer["finish_reason"] == "stop"
    assert answer["message"]["content"] == model.chat(CHAT["messages"], max_tokens=60, json_schema=SCHEMA).text
    anything = post(api, "/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}, "max_tokens": 8}).json()
    assert anything["choices"][0]["message"]["content"].startswith("{")
    for schema in ({"type": "nothing"}, {"$ref": "http://example.org/schema"}, {"pattern": "("}):
        wanted["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
        error = post(api, "/v1/chat/completions", CHAT | wanted).json()["error"]
        assert (error["param"], error["code"]) == ("response_format", "invalid_value"), error


def test_completions_take_a_format_as_chats_do(api, model):
    wanted = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    text = post(api, "/v1/completions", TEXT | {"max_tokens": 60, "response_format": wanted}).json()["choices"][0]["text"]
    assert text == model.generate("The whale", max_tokens=60, json_schema=SCHEMA).text and set(json.loads(text)) == {"size"}
    wanted["json_schema"]["schema"] = {"pattern": "("}
    error = post(api, "/v1/completions", TEXT | {"response_format": wanted})
    assert error.status_code == 400 and error.json()["error"]["param"] == "response_format"


def test_prompts_that_begin_alike_are_computed_once(store):
    with elmoe.load(store, prefix_cache=True) as model, TestClient(create_app(model, Settings("whale"))) as api:
        body = TEXT | {"prompt": "The whale and the sea. " * 40}
        first, second = (post(api, "/v1/completions", body).json() for _ in range(2))
        assert first["choices"] == second["choices"]
        cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (first, second)]
        assert cached[0] == 0 and cached[1] >= 128
        told = metrics(api)
        assert told["elmoe_prefix_cache_hits_total"] == cached[1] and told['elmoe_fast_memory_bytes{use="prefix_cache"}'] > 0


def metrics(api):
    lines = api.get("/metrics").text.splitlines()
    return {name: float(value) for line in lines if line[0] != "#" for name, _, value in [line.rpartition(" ")]}


def test_metrics_count_what_was_served(api, model):
    before = metrics(api)
    post(api, "/v1/completions", TEXT | {"n": 2, "max_tokens": 30})
    post(api, "/v1/completions", TEXT | {"stream": True})
    api.get("/nowhere/else")
    after = metrics(api)
    prompt = len(model.encode("The whale"))
    changes = {name: after[name] - before.get(name, 0) for name in after}
    assert changes["elmoe_prompt_tokens_total"] == 2 * prompt and changes["elmoe_generation_tokens_total"] == 72
    assert changes['elmoe_request_success_total{finished_reason="length"}'] == 3
    assert changes["elmoe_time_to_first_token_seconds_count"] == changes["elmoe_time_per_output_token_seconds_count"] == 2
    assert changes['elmoe_http_requests_total{path="other",status="404"}'] == 1
    assert 0 < changes["elmoe_decode_steps_total"] <= 45 and changes["elmoe_engine_seconds_total"] > 0
    assert changes["elmoe_msb_hits_total"] > 0 and changes['elmoe_slice_bytes_total{tier="fast"}'] > 0
    drafted, accepted = (after[f"elmoe_spec_decode_num_{name}_tokens_total"] for name in ("draft", "accepted"))
    assert drafted >= accepted >= 0 and after["elmoe_requests_running"] == after["elmoe_requests_waiting"] == 0
    assert after['elmoe_fast_memory_bytes{use="expert_slices"}'] > after['elmoe_fast_memory_bytes{use="staging"}'] > 0


def test_the_dashboard_shows_metrics_that_exist(api):
    post(api, "/v1/completions", TEXT)
    dashboard = json.loads((Path(__file__).resolve().parents[2] / "docs" / "grafana-dashboard.json").read_text())
    shown = {name for panel in dashboard["panels"] for target in panel["targets"] for name in NAME.findall(target["expr"])}
    names = {name.partition("{")[0] for name in metrics(api)}
    assert len(shown) > 15 and shown <= names


def test_the_description_names_all_routes_and_fields(api):
    description = api.get("/openapi.json").json()
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/tokenize", "/detokenize", "/props"} <= set(
        description["paths"]
    )
    assert {"temperature", "messages", "response_format"} <= set(
        description["components"]["schemas"]["ChatBody"]["properties"]
    )
    for path in ("/v1/chat/completions", "/v1/completions"):
        kinds = description["paths"][path]["post"]["responses"]["200"]["content"]
        assert kinds.keys() == {"application/json", "text/event-stream"} and "$ref" in kinds["application/json"]["schema"]


def test_a_model_is_named_as_it_was_given(tmp_path):
    from elmoe.cli.serve import given_name

    names = {"demo": "demo", "models/SmolLM2.Q4_1.gguf": "SmolLM2.Q4_1", str(tmp_path / "my-store/"): "my-store", "/": ""}
    assert {path: given_name(path) for path in names} == names
