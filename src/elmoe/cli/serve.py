"""``elmoe serve``."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elmoe.cli.common import NumberRange, Quantity, Serving, json_option, serving_options
from elmoe.units import format_bytes, parse_bytes, parse_memory
from elmoe.untrusted import short

if TYPE_CHECKING:
    from elmoe.engine.options import EngineOptions
    from elmoe.llm import Model

KEY_VARIABLE = "ELMOE_API_KEY"
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")
"""What browsers send, and pages of desktop programs: app://obsidian.md, for example."""
LEAST_BODY = 1 << 10
LONGEST_KEYS = 1 << 20
"""Bytes of the largest file of keys."""

file = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("serve")
@click.argument("store")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all of this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--model-name", help="Name of the model for clients [default: the store's].")
@click.option("--mode", type=click.Choice(["plain", "cache", "elastic"]), default="elastic", show_default=True,
              help="plain: no drafts, nothing is kept in memory. cache: the experts used most are kept. elastic: these also "
              "draft.")  # fmt: skip
@click.option("--batch", type=click.IntRange(1, 64), default=16, show_default=True, help="Answers that run at once.")
@click.option("--queue", type=click.IntRange(0, 100_000), default=64, show_default=True,
              help="Answers that may wait; further ones are refused with 429.")  # fmt: skip
@click.option("--memory", type=Quantity("SIZE", parse_memory), help="All memory that the server may take, 8GiB for "
              "example: what fits is told, too little is refused [default: what is available, less 512 MiB].")  # fmt: skip
@click.option("--prefix-cache/--no-prefix-cache", default=True, show_default=True,
              help="Keep what was computed of earlier prompts and chats, for those that begin alike.")  # fmt: skip
@click.option("--api-key", "keys", multiple=True, help="Key that clients send; may be repeated [default: $ELMOE_API_KEY, "
              "which other users of this machine do not see].")  # fmt: skip
@click.option("--api-key-file", type=file, help="File of keys, one a line.")
@click.option("--cors-origins", multiple=True, help="Origin of a web page that may use the server, such as "
              "https://chat.example; may be repeated. * is all.")  # fmt: skip
@click.option("--tls-cert", type=file, help="Certificate (PEM) for HTTPS.")
@click.option("--tls-key", type=file, help="Its key (PEM).")
@click.option("--max-body", type=Quantity("SIZE", parse_bytes), default="4MiB", show_default=True, help="Largest body.")
@click.option("--max-prompt", type=click.IntRange(1), help="Most tokens of a prompt [default: the context].")
@click.option("--max-n", type=click.IntRange(1, 64), default=16, show_default=True, help="Most answers to one request.")
@click.option("--max-connections", type=click.IntRange(1, 100_000), default=512, show_default=True,
              help="Connections at once; further ones are closed.")  # fmt: skip
@click.option("--body-timeout", type=NumberRange(0.1, 3600), default=30, show_default=True,
              help="Seconds that a request may take to arrive.")  # fmt: skip
@click.option("--timeout", type=NumberRange(1, 1e6), default=3600, show_default=True,
              help="Seconds that a request may take, waiting included.")  # fmt: skip
@serving_options
@json_option
def command(
    store: str, host: str, port: int, model_name: str | None, mode: Any, batch: int, queue: int, memory: int | None,
    prefix_cache: bool, keys: tuple[str, ...], api_key_file: Path | None,
    cors_origins: tuple[str, ...], tls_cert: Path | None, tls_key: Path | None, max_body: int,
    max_prompt: int | None, max_n: int, max_connections: int, body_timeout: float, timeout: float, serving: Serving,
    as_json: bool,
) -> int:  # fmt: skip
    """Serve STORE to clients of OpenAI's API: a store, a GGUF file, a Hugging Face folder, or demo.

    Listens on this machine alone unless --host says otherwise. The log goes to standard error, with --json as JSON lines; it
    never holds prompts or answers. The first Ctrl-C finishes what runs, the second ends it.
    """
    import logging

    from elmoe.server.app import create_app
    from elmoe.server.listening import bound_socket, check_tls, serve
    from elmoe.server.logs import configure
    from elmoe.server.settings import Settings

    serving.check_mode(mode)
    if model_name is not None and not model_name.strip():
        raise click.UsageError("--model-name is empty")
    if max_body < LEAST_BODY:
        raise click.UsageError(f"--max-body is {format_bytes(max_body)}, at least {format_bytes(LEAST_BODY)} are needed")
    for origin in cors_origins:
        if not ORIGIN.fullmatch(origin):
            raise click.UsageError(f"--cors-origins '{short(origin, 60)}' is no origin: https://chat.example is one")
    configure(as_json)
    log = logging.getLogger("elmoe.server")
    check_tls(tls_cert, tls_key)
    keys = (*_given_keys(keys, api_key_file), *_keys_of(api_key_file))
    listener = bound_socket(host, port)  # before the model is loaded, which may take minutes
    if not keys and not _is_loopback(host):
        log.warning("other machines may use this server, and no key is asked for: give --api-key-file")
    options = replace(serving.options(mode, batch), prefix_cache=prefix_cache)
    with listener, _load(store, serving, options, memory) as model:
        log.info("loaded", extra={"facts": {"reader": model.reader_note, "tier": model.tier}})
        settings = Settings(
            model_name or given_name(store) or model.path.name, keys, cors_origins, queue, body_bytes=max_body,
            prompt_tokens=max_prompt,
            answers=min(max_n, model.engine.options.batch + queue), request_seconds=timeout, body_seconds=body_timeout,
            connections=max_connections,
        )  # fmt: skip
        ordered = serve(create_app(model, settings), listener, tls_cert, tls_key)
    return 0 if ordered else 130


def given_name(store: str) -> str:
    """What a user would call a model given by this path: without folders and ``.gguf``."""
    return Path(os.path.abspath(store)).name.removesuffix(".gguf")


def _load(store: str, serving: Serving, options: EngineOptions, memory: int | None) -> Model:
    """The model, within ``memory`` bytes, or as the single options of memory say."""
    import logging

    from elmoe.convert.cache import stored
    from elmoe.errors import RequestError
    from elmoe.opening import use_threads
    from elmoe.server.memory import forecast, planned
    from elmoe.store import open_store, resolve_store

    single = serving.fast_memory is not None or serving.kv_memory is not None or serving.reader != "auto"
    if single and memory is not None:
        raise RequestError("--memory divides the memory itself", "leave out --fast-memory, --kv-memory and --reader")
    if single:
        return serving.load(store, options)
    path = resolve_store(stored(store, serving.store_dir))
    use_threads(serving.backend, serving.threads)
    with open_store(path) as reader:
        parts = forecast(reader, sum(file.bytes for file in reader.manifest.files), options, memory)
    logging.getLogger("elmoe.server").info("forecast", extra={"facts": parts.facts()})
    return replace(serving, reader="memory" if parts.whole else "direct").load(str(path), planned(options, parts))


def _is_loopback(host: str) -> bool:
    """Whether other machines cannot reach an address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def _given_keys(keys: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """The keys given, or that of the environment, without the space around them, which no header carries. RequestError where
    one is empty: a variable that was to hold a secret and does not must not leave the server open."""
    from elmoe.errors import RequestError

    where, given = "--api-key", [key.strip() for key in keys]
    if not keys and KEY_VARIABLE in os.environ:
        where, given = f"${KEY_VARIABLE}", [os.environ[KEY_VARIABLE].strip()]
        if file is not None and given == [""]:
            return ()
    if "" in given:
        raise RequestError(f"{where} is empty", "give a key; unset or left out, none is asked for")
    return tuple(given)


def _keys_of(path: Path | None) -> tuple[str, ...]:
    """The keys of a file; RequestError where it has none."""
    if path is None:
        return ()
    from elmoe.errors import RequestError
    from elmoe.untrusted import read_text

    lines = read_text(path, RequestError, LONGEST_KEYS, "file of keys").splitlines()
    found = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not found:
        raise RequestError(f"'{path}' holds no key", "write one key a line")
    return found
