"""Chats are rendered as transformers renders them, on real templates: `make parity` fetches them into build/templates."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from elmoe.chat import render, special_tokens_of
from elmoe.errors import RequestError

pytest.importorskip("transformers")
from transformers.utils.chat_template_utils import render_jinja_template

FOLDER = Path(os.environ.get("ELMOE_TEMPLATES", Path(__file__).parents[2] / "build" / "templates"))
TEMPLATES = sorted(FOLDER.glob("*.json"))
TOOL = {
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather <of> a 'place' & time, \"now\".",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "Zürich, 東京"}},
                       "required": ["place"]},
    },
}  # fmt: skip
USER = {"role": "user", "content": "  What is <b>gravity</b> & 'é'?\n"}
CHATS = {
    "user": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "turns": [
        USER,
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nA force. "},
        {"role": "user", "content": "Why?"},
    ],
    "none": [USER, {"role": "assistant", "content": "A force.", "tool_calls": None}, {"role": "user", "content": "Why?"}],
    "answered": [USER, {"role": "assistant", "content": "A force."}],
    "two users": [USER, USER],
    "calls": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"place": "Zürich"}}}]},
        {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "{\"sky\": \"<clear>\"}"},
    ],
}  # fmt: skip
CASES = [
    (chat, tools, prompt, more)
    for chat in CHATS
    for tools in (None, [TOOL])
    for prompt, more in ((True, {}), (False, {}), (True, {"enable_thinking": False}))
]


def test_there_are_at_least_twelve_real_templates():
    if not TEMPLATES:
        pytest.skip("no templates: python tests/parity/fetch_templates.py build/templates")
    assert len(TEMPLATES) >= 12


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_chat_is_rendered_as_transformers_renders_it(path):
    data = json.loads(path.read_text())
    tokens = special_tokens_of(data["config"]) or {"bos_token": "<s>", "eos_token": "</s>"}
    rendered = 0
    for chat, tools, prompt, more in CASES:
        messages = CHATS[chat]
        try:
            expected = render_jinja_template(
                [[{key: value for key, value in message.items() if value is not None} for message in messages]],
                tools=tools, chat_template=data["template"], add_generation_prompt=prompt, **tokens, **more,
            )[0][0]  # fmt: skip
        except Exception:
            with pytest.raises(RequestError):
                render(data["template"], messages, tokens, tools, prompt, **more)
            continue
        assert render(data["template"], messages, tokens, tools, prompt, **more) == expected, (
            chat,
            bool(tools),
            prompt,
            more,
        )
        rendered += 1
    assert rendered >= 6
