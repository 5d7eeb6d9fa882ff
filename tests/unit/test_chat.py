"""Chat templates: rendered as transformers does, found where checkpoints keep them, bounded in time and memory."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os

import pytest

from elmoe import chat
from elmoe.chat import choose_template, render, special_tokens_of, templates_of
from elmoe.errors import ConvertError, RequestError

MESSAGES = [{"role": "user", "content": "a <b> & 'é'", "tool_calls": None}]
SHOWN = [{"role": "user", "content": "a <b> & 'é'"}]
TOKENS = {"bos_token": "<s>", "eos_token": "<end>"}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}U{{ messages[0].content }}{{ eos_token }}", "<s>Ua <b> & 'é'<end>"),
        ("{{ messages[0].content | tojson }}", "\"a <b> & 'é'\""),
        ("{{ messages | tojson(indent=1) }}", json.dumps(SHOWN, indent=1, ensure_ascii=False)),
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "a <b> & 'é'"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "a <b> & 'é'"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{{ pad_token is defined }} {{ tools is none }} {{ documents is none }}", "False True True"),
        ("{{ add_generation_prompt }}", "True"),
        ("{{ messages[0].tool_calls is defined }}", "False"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}{{ dict(a=3).a }}", "23"),
    ],
    ids=["tokens", "tojson", "indent", "break", "continue", "generation", "blocks", "unset", "prompt", "none", "namespace"],
)  # fmt: skip
def test_templates_are_rendered_as_transformers_renders_them(template, text):
    assert render(template, MESSAGES, TOKENS) == text


def test_the_date_is_todays():
    before = datetime.date.today().year
    assert before <= int(render("{{ strftime_now('%Y') }}", MESSAGES)) <= datetime.date.today().year


def test_further_variables_reach_the_template():
    assert (
        render("{{ enable_thinking }}{{ tools[0].name }}", MESSAGES, tools=[{"name": "f"}], enable_thinking=False)
        == "Falsef"
    )


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('only system messages') }}", "refuses the messages: only system messages"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% include 'x' %}", "loader"),
        ("{% extends 'x' %}", "loader"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'x' * (2 ** 70) }}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "calls itself too deeply"),
        ("{{ 'x' | center(10 ** 9) }}", "too much memory"),
        ("{{ '%1000000000d' % 1 }}", "too much memory"),
        ("{{ 'x' * 20000000 }}", "writes more than"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ ().__class__.__bases__ }}", "unsafe"),
        ("{% set ns = namespace(_x=1) %}", "underscore"),
        ("x" * (2 << 20), "larger than 1 MiB"),
        ("{{ '\ud800' }}", "not Unicode"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)  # fmt: skip
def test_every_failure_of_a_template_is_a_request_error(template, told):
    with pytest.raises(RequestError, match=told) as caught:
        render(template, MESSAGES)
    assert caught.value.hint and len(str(caught.value)) < 500
    assert render("{{ messages[0].role }}", MESSAGES) == "user"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    ],
    ids=["loops", "doubling"],
)
def test_a_template_that_does_not_end_is_ended(monkeypatch, template):
    monkeypatch.setattr(chat, "SECONDS", 1)
    with pytest.raises(RequestError, match=r"takes more than|too much memory"):
        render(template, MESSAGES)
    assert render("{{ messages[0].role }}", MESSAGES) == "user"


def test_the_process_that_renders_stays_and_is_replaced_when_it_dies():
    render("x", MESSAGES)
    process = chat._worker._process
    render("y", MESSAGES)
    assert process is not None and chat._worker._process is process
    os.kill(process.pid, 9)
    process.wait()
    assert render("z", MESSAGES) == "z"


def test_a_child_of_fork_renders_while_its_parent_does():
    """The lock is held when the process forks, by a thread that the child does not have."""
    with chat._worker._lock:
        child = multiprocessing.get_context("fork").Process(target=lambda: render("x", MESSAGES))
        child.start()
        child.join(30)
        ended = child.exitcode
        child.kill()
    assert ended == 0 and render("y", MESSAGES) == "y"


def test_messages_that_are_no_json_are_refused():
    with pytest.raises(RequestError, match="no JSON"):
        render("x", [{"role": "user", "content": object()}])


def test_special_tokens_are_text_or_objects_with_content():
    config = {"bos_token": "<s>", "eos_token": {"content": "<end>", "special": True}, "pad_token": None, "unk_token": 5}
    assert special_tokens_of(config) == {"bos_token": "<s>", "eos_token": "<end>"}


NAMED = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "<u>{{ messages[0].content }}"}]
T = "<u>{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"chat_template.jinja": T}, {"default": T}),
        ({"tokenizer_config.json": {"chat_template": T}}, {"default": T}),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, {"tool_use": "t", "default": T}),
        ({"chat_template.json": {"chat_template": T}, "tokenizer_config.json": {}}, {"default": T}),
        ({"chat_template.jinja": T, "tokenizer_config.json": {"chat_template": "old"}}, {"default": T}),
        ({"tokenizer_config.json": {"chat_template": None}}, {}),
        ({}, {}),
    ],
    ids=["jinja", "text", "named", "json", "file first", "null", "none"],
)  # fmt: skip
def test_templates_are_found_where_checkpoints_keep_them(tmp_path, files, found):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert templates_of(tmp_path) == found


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("chat_template.jinja", b"\xff"), ("chat_template.jinja", b"x" * (2 << 20)), ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("chat_template.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}'), ("tokenizer_config.json", b"[" * 100_000),
    ],
)  # fmt: skip
def test_a_damaged_template_file_is_named(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ConvertError, match=name):
        templates_of(tmp_path)


def test_the_default_template_counts_and_tools_take_their_own():
    both = {"default": "d", "tool_use": "t"}
    assert choose_template(both) == "d" and choose_template(both, tools=True) == "t"
    assert choose_template({"rag": "r"}) == "r" and choose_template({}) is None
    assert choose_template({"rag": "r", "tool_use": "t"}) is None
