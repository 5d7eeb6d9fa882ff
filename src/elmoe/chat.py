"""Chat templates: found in a checkpoint, and rendered as transformers renders them, in a process of limited time and memory.

A template is code that others wrote. The process that runs it (``elmoe.chat_worker``) is started at the first use and stays;
it is killed when a template takes too long. Every failure is a RequestError.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any

from elmoe.errors import ConvertError, ElmoeError, RequestError
from elmoe.untrusted import load_object, read_bytes, short, text_of

MEMORY = 512 << 20
"""Most bytes of address space of the process that renders."""
SECONDS = 5
"""Most processor seconds of one template; the clock on the wall may take twice as long."""
TEMPLATE_LIMIT = 1 << 20
"""Largest template, bytes."""
CONFIG_LIMIT = 32 << 20
"""Largest tokenizer_config.json: some list every added token."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Variables of a template that name special tokens, as in tokenizer_config.json."""
ROLES = ("system", "user", "assistant")
"""Roles that every template is given."""
WRITES_ROLES = re.compile(r"""(?:\{\{-?|\+|~)\s*\w+(?:\.role|\[['"]role['"]\])""")
MESSAGE = '{"role": "user", "content": "..."}'


def plain_messages(messages: Any, template: str | None = None) -> list[dict[str, Any]]:
    """Messages as templates know them: the parts of a content joined, ``developer`` as ``system``, other keys as they are.

    :param template: where it is given, it must know roles other than the usual three.
    :raises RequestError: names the message that has no role or text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("the messages are no list of mappings with roles, or an empty one", f"give [{MESSAGE}]")
    return [_plain(message, f"message {index}", template) for index, message in enumerate(messages)]


def _plain(message: Any, where: str, template: str | None) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise RequestError(f"{where} is no mapping with a role", f"give {MESSAGE}")
    role = "system" if role == "developer" else role
    if template is not None and role not in ROLES and not _knows(template, role):
        raise RequestError(f"{where} has the role '{short(role, 40)}', which the chat template does not know", "use another")
    content = message.get("content")
    if isinstance(content, (list, tuple)) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    calls = role == "assistant" and isinstance(message.get("tool_calls"), list) and message["tool_calls"]
    if not isinstance(content, str) and not (content is None and calls):
        raise RequestError(f"{where} has no text as its content", f"give {MESSAGE}")
    return {**message, "role": role, "content": content}


def _knows(template: str, role: str) -> bool:
    """Whether a template names a role, or writes the names of roles out."""
    return bool(re.search(f"""['"]{re.escape(role[:40])}['"]""", template) or WRITES_ROLES.search(template))


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def render(
    template: str, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = True, **variables: Any,
) -> str:  # fmt: skip
    """The text of a chat, special tokens written out: encode it without adding any.

    :param special_tokens: such as ``{"bos_token": "<s>"}``; see :func:`special_tokens_of`. :param variables: further
        variables of the template, such as ``enable_thinking``.
    :raises RequestError: the template refuses the messages, fails, or takes too much time or memory.
    """
    if len(template.encode("utf-8", "surrogatepass")) > TEMPLATE_LIMIT:
        raise RequestError(f"the chat template is larger than {TEMPLATE_LIMIT >> 20} MiB", "give a plain prompt")
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    data = {
        "messages": plain, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt,
        **(special_tokens or {}), **variables,
    }  # fmt: skip
    try:
        request = json.dumps({"template": template, "variables": data, "seconds": SECONDS}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the messages are no JSON: {short(error)}", "give text, numbers, lists and mappings") from None
    reply = _worker.ask(request)
    if "text" in reply:
        text = str(reply["text"])
        if re.search("[\ud800-\udfff]", text):
            raise RequestError(
                "the rendered chat is not Unicode text", "convert the messages, for example with iconv -t utf-8"
            )
        return text
    kind = reply.get("kind", "")
    said = short(reply.get("error", "")) or kind
    if kind in ("TemplateError", "UndefinedError"):
        raise RequestError(f"the chat template refuses the messages: {said}", "change the messages, or give a plain prompt")
    raise RequestError(f"the chat template fails: {said} ({kind})", "give a plain prompt")


def check_template(template: str, error: type[ElmoeError] = ConvertError) -> None:
    """Compile a template in the process with limits.

    :raises ElmoeError: an ``error`` where it is too large, no template, or takes too much time or memory.
    """
    hint = "mend the chat template, or remove it: plain prompts need none"
    if len(template.encode("utf-8", "surrogatepass")) > TEMPLATE_LIMIT:
        raise error(f"the chat template is larger than {TEMPLATE_LIMIT >> 20} MiB", hint)
    try:
        reply = _worker.ask(json.dumps({"template": template, "variables": None, "seconds": SECONDS}).encode())
    except RequestError as reason:
        raise error(str(reason), hint) from None
    if "text" not in reply:
        said = short(reply.get("error", "")) or reply.get("kind", "")
        raise error(f"the chat template is no Jinja template: {said}", hint)


def special_tokens_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json, by the variables that templates know them by; those not set are left
    out, so that a template finds them undefined."""
    found = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def templates_of(folder: Path, error: type[ElmoeError] = ConvertError) -> dict[str, str]:
    """The chat templates of a checkpoint by name; the usual one is called ``default``. Empty if it has none.

    chat_template.jinja comes before chat_template.json, and that before tokenizer_config.json, as in transformers.

    :raises ElmoeError: an ``error`` that names the file which is damaged.
    """
    single = folder / "chat_template.jinja"
    if os.path.exists(single):
        raw = read_bytes(single, error, TEMPLATE_LIMIT, "chat template")
        return {"default": text_of(raw, str(single), error)}
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if os.path.exists(path):
            config = load_object(read_bytes(path, error, CONFIG_LIMIT, name), str(path), error, repeated_keys=True)
            if config.get("chat_template") is not None:
                return _named(config["chat_template"], str(path), error)
    return {}


def _named(value: Any, where: str, error: type[ElmoeError]) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict) and value and all(isinstance(text, str) for text in value.values()):
        return dict(value)
    named = {}
    for item in value if isinstance(value, list) else [None]:
        name, text = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise error(f"'{where}': chat_template is neither text nor a list of named templates")
        named[name] = text
    return named


def choose_template(templates: Mapping[str, str], tools: bool = False) -> str | None:
    """The template for a request: ``tool_use`` where there is one and tools are given, else ``default``, or the only one."""
    if tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    return next(iter(templates.values())) if len(templates) == 1 else None


class _Worker:
    """The process, started when it is needed; one request at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def ask(self, request: bytes) -> dict[str, Any]:
        """The reply to a request; RequestError if it does not come in time, or the process dies of a limit."""
        with self._lock:
            try:
                process = self._started()
                _send(process, request)
                return self._receive(process, monotonic() + 2 * SECONDS)
            except BaseException:  # Ctrl-C too: a reply that comes later must not answer another request
                self.stop()
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        if self._process is None:
            # Without `site`, which takes longer to load than Jinja; the folders of the two packages are handed over.
            specs = [find_spec(name) for name in ("jinja2", "markupsafe")]
            folders = list(dict.fromkeys(str(Path(str(spec.origin)).parent.parent) for spec in specs if spec))
            worker = str(Path(__file__).with_name("chat_worker.py"))
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", worker, str(MEMORY), *folders], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._receive(self._process, monotonic() + 30)
        return self._process

    def _receive(self, process: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
        size = int.from_bytes(self._read(process, 8, deadline), "little")
        reply: dict[str, Any] = json.loads(self._read(process, size, deadline))
        return reply

    def _read(self, process: subprocess.Popen[bytes], count: int, deadline: float) -> bytes:
        assert process.stdout is not None
        data = bytearray()
        while len(data) < count:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - monotonic()))
            if not ready:
                raise RequestError(f"the chat template takes more than {SECONDS} s", "give a plain prompt")
            part = process.stdout.raw.read(count - len(data))  # type: ignore[attr-defined]
            if not part:
                raise RequestError(
                    f"the chat template takes more than {SECONDS} s or {MEMORY >> 20} MiB", "give a plain prompt"
                )
            data += part
        return bytes(data)

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(OSError):
                    if stream is not None:
                        stream.close()


def _send(process: subprocess.Popen[bytes], request: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(len(request).to_bytes(8, "little") + request)
        process.stdin.flush()
    except OSError as error:
        raise RequestError(f"the chat template cannot be rendered: {error.strerror}", "give a plain prompt") from None


def _forget_worker() -> None:
    """A child of fork begins anew: the process is its parent's, and the lock may be held by a thread that it lacks."""
    global _worker
    _worker = _Worker()


_worker = _Worker()
atexit.register(lambda: _worker.stop())
os.register_at_fork(after_in_child=_forget_worker)
