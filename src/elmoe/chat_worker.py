"""The process that renders chat templates, which are untrusted code: started by ``elmoe.chat``, with limits.

Run as a script; it imports Jinja and nothing of elmoe. Requests and replies are JSON, each behind its length in 8 bytes:
``{"template", "variables", "seconds"}``, answered by ``{"text"}`` or ``{"error", "kind"}``.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

MOST_TEXT = 16 << 20
"""Longest rendered chat, characters."""


def make_environment() -> Any:
    """The environment that templates are written for: that of ``apply_chat_template`` in transformers."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """``{% generation %}``: marks what the assistant wrote, for training; the text is the body's."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Without underscored attributes, through which a template could reach the interpreter."""

        def __init__(*args: Any, **keywords: Any) -> None:  # a template may pass the keyword `self`
            self, *rest = args
            attributes = dict(*rest, **keywords)
            for name in attributes:
                _plain(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _plain(name)
            super().__setitem__(name, value)

    def _plain(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"the attribute {name!r} of a namespace begins with an underscore")

    def refuse(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def make_dict(*args: Any, **keywords: Any) -> dict[Any, Any]:
        return dict(*args, **keywords)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(
        raise_exception=refuse, strftime_now=lambda format: datetime.now().strftime(format), dict=make_dict,
        namespace=Namespace,
    )  # fmt: skip
    return environment


def renderer() -> Callable[[str, dict[str, Any] | None], str]:
    """A function of a template and its variables; None compiles it alone. The templates last used stay compiled."""
    environment = make_environment()
    compiled = lru_cache(8)(environment.from_string)

    def render(template: str, variables: dict[str, Any] | None) -> str:
        parts, length, code = [], 0, compiled(template)
        for part in code.generate(**variables) if variables is not None else ():
            parts.append(part)
            length += len(part)
            if length > MOST_TEXT:
                raise OverflowError(f"it writes more than {MOST_TEXT} characters")
        return "".join(parts)

    return render


def serve(memory: int) -> None:
    """Answer requests until stdin ends. ``memory``: most bytes of address space."""
    render = renderer()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    _reply(sink, {"ready": True})
    while header := source.read(8):
        request = json.loads(source.read(int.from_bytes(header, "little")))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = int(usage.ru_utime + usage.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (used + 1 + request["seconds"], resource.RLIM_INFINITY))
        try:
            reply = {"text": render(request["template"], request["variables"])}
        except MemoryError:
            reply = {"error": "it needs too much memory", "kind": "MemoryError"}
        except RecursionError:
            reply = {"error": "it calls itself too deeply", "kind": "RecursionError"}
        except Exception as error:  # whatever untrusted code raises
            reply = {"error": str(error)[:2000], "kind": type(error).__name__}
        _reply(sink, reply)


def _reply(sink: Any, data: dict[str, Any]) -> None:
    raw = json.dumps(data).encode()
    sink.write(len(raw).to_bytes(8, "little") + raw)
    sink.flush()


if __name__ == "__main__":
    sys.path[:0] = sys.argv[2:]
    serve(int(sys.argv[1]))
