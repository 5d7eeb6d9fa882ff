"""``elmoe chat``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elmoe.cli.common import PromptText, Serving, json_option, refuse_given, seed_type, serving_options, temperature_type
from elmoe.errors import ElmoeError
from elmoe.terminal import shown

if TYPE_CHECKING:
    from elmoe.cli.conversation import Conversation

COMMANDS = {
    "/settings": "show the settings; /settings temperature 0.2 changes one, /settings temperature default resets it",
    "/stats": "tokens and times of the last answer",
    "/clear": "begin anew",
    "/help": "this list",
    "/exit": "leave, as Ctrl-D does",
}
"""What a line may be instead of a message."""


@click.command("chat")
@click.argument("store", metavar="STORE|URL")
@click.option("--model", "model_name", help="With a URL: the model to ask [default: the first of the server].")
@click.option("--api-key", envvar="ELMOE_API_KEY", help="With a URL: the key of the server [default: $ELMOE_API_KEY].")
@click.option("--system", type=PromptText(), help="System message.")
@click.option("--mode", type=click.Choice(["plain", "cache", "elastic"]), default="elastic", show_default=True,
              help="plain: no drafts, nothing is kept in memory. cache: the experts used most are kept. elastic: these also "
              "draft.")  # fmt: skip
@click.option("--temperature", type=temperature_type, default=0.7, show_default=True, help="0 is greedy.")
@click.option("--seed", type=seed_type, help="Same messages, same answers [default: drawn for each answer].")
@click.option("--max-tokens", type=click.IntRange(1, 1 << 24), default=1024, show_default=True,
              help="Tokens of an answer at most.")  # fmt: skip
@serving_options
@json_option
def command(
    store: str, model_name: str | None, api_key: str | None, system: str | None, mode: Any, temperature: float,
    seed: int | None, max_tokens: int, serving: Serving, as_json: bool,
) -> None:  # fmt: skip
    """Talk with a model in the terminal: a store, a GGUF file, a Hugging Face folder, or the URL of a server.

    Ctrl-C ends an answer, Ctrl-D the chat; /help lists commands. From a pipe, each line is a message; with --json each
    answer is one JSON object a line.
    """
    from elmoe.cli.conversation import Conversation, Local, Remote

    interactive = sys.stdin.isatty() and not as_json
    ask = _prompter() if interactive else None  # before the model is loaded: it may not be installed
    remote = store.startswith(("http://", "https://"))
    if remote:
        refuse_given(
            ("mode", *(field.name for field in fields(Serving))), "is for a model of this process, not for a server"
        )
    else:
        refuse_given(("model_name", "api_key"), "needs the URL of a server")
        serving.check_mode(mode)
    options = replace(serving.options(mode, 1), prefix_cache=True)  # each turn begins as the one before
    with nullcontext() if remote else serving.load(store, options) as model:
        answerer = Remote(store, api_key and api_key.strip(), model_name) if model is None else Local(model)
        settings = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens}
        chat = Conversation(answerer, system, {name: value for name, value in settings.items() if value is not None})
        if ask is not None:
            click.echo(f"{chat.answerer.name}; /help lists commands", err=True)
            _talk(chat, ask)
        else:
            _answer_lines(chat, as_json)


def _prompter() -> Callable[[], str]:
    """Asks for lines, with a history of its own; EOFError at the end."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory

    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "elmoe"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    completer = WordCompleter(list(COMMANDS), sentence=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(folder / "chat_history")), completer=completer)
    return lambda: session.prompt("> ")


def _talk(chat: Conversation, ask: Callable[[], str]) -> None:
    """Until the end of input."""
    while True:
        try:
            line = ask().strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        try:
            if line == "/exit":
                return
            if line.startswith("/"):
                _obey(chat, line.split())
            elif line:
                _show_answer(chat, line)
        except ElmoeError as error:
            click.echo(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), err=True)


def _show_answer(chat: Conversation, line: str) -> None:
    with closing(chat.say(line)) as answer:
        try:
            for piece in answer:
                click.echo(shown(piece), nl=False)
        except KeyboardInterrupt:
            click.echo(" ...", nl=False)
    click.echo()


def _obey(chat: Conversation, words: list[str]) -> None:
    """A line that is a command."""
    if words[0] == "/settings" and len(words) == 3:
        chat.set(words[1], words[2])
    elif words[0] == "/settings":
        click.echo("\n".join(f"{name} {value}" for name, value in chat.settings.items()))
    elif words[0] == "/stats":
        told = {name: value for name, value in chat.last.as_dict().items() if value is not None}
        click.echo("\n".join(f"{name} {value}" for name, value in told.items()))
    elif words[0] == "/clear":
        chat.clear()
    else:
        if words[0] != "/help":
            click.echo(f"there is no command {shown(words[0])}", err=True)
        click.echo("\n".join(f"{name}: {text}" for name, text in COMMANDS.items()))


def _answer_lines(chat: Conversation, as_json: bool) -> None:
    """Each line of standard input is a message, or a command."""
    from elmoe.files import json_text

    for line in sys.stdin:
        words = line.split()
        if words and words[0] in COMMANDS:
            if words[0] == "/exit":
                return
            _obey(chat, words)
        elif words and as_json:
            text = "".join(chat.say(line.strip()))
            click.echo(json_text({"content": text, "statistics": chat.last.as_dict()}))
        elif words:
            _show_answer(chat, line.strip())
