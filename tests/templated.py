"""A store with a chat template: the demo's, with a template and special tokens beside it."""

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
