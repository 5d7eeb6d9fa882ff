"""Copies of the demo store with another chat template and special tokens, or without a template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from elmoe.store import resolve_store
from elmoe.store.format import checksum

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if tools %}tools: {{ tools[0].name }}\n{% endif %}{% if shout is defined %}{{ shout }}{% endif %}assistant:"
)


def templated_store(folder: Path, template: str = TEMPLATE) -> Path:
    store = Path(shutil.copytree(resolve_store("demo"), folder / "templated"))
    (store / "chat_template.jinja").write_text(template)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["chat_template"] = {"name": "chat_template.jinja", "checksum": checksum(template.encode())}
    manifest["special_tokens"] = {"bos_token": "<|endoftext|>"}
    (store / "manifest.json").write_text(json.dumps(manifest))
    return store


def untemplated_store(folder: Path) -> Path:
    store = Path(shutil.copytree(resolve_store("demo"), folder / "untemplated"))
    (store / "chat_template.jinja").unlink()
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["chat_template"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    return store
