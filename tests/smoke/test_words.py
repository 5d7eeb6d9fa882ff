"""What people read: the closing lines of the demo, the words of ``doctor``, explanations of tables, help texts."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from elmoe.cli import demo, doctor
from elmoe.cli.main import cli
from elmoe.systems.forms import FORM_WORDS, FORMS
from elmoe.terminal import print_table, progress_bar, small_number
from tests.command import run
from tests.templated import templated_store

GIB = 2**30


def told(*words: str) -> str:
    ran = CliRunner().invoke(cli, list(words))
    assert ran.exit_code == 0 and ran.exception is None, ran.output
    return ran.stdout


def flat(text: str) -> str:
    return " ".join(text.split())


def commands(command: click.Command = cli, name: str = "elmoe") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for sub in command.list_commands(context):
            found = command.get_command(context, sub)
            assert found is not None
            yield from commands(found, f"{name} {sub}")


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_and_help_fits_in_eighty_columns(name):
    command = COMMANDS[name]
    assert command.help and "``" not in command.help
    for option in command.params:
        if isinstance(option, click.Option) and option.name not in ("help", "version"):
            assert option.help and option.help[-1] in ".]", (name, option.name, option.help)
    text = CliRunner().invoke(cli, [*name.split()[1:], "--help"], terminal_width=80).output
    assert max(map(len, text.splitlines())) <= 80
    _, _, listed = text.partition("Commands:")
    assert "..." not in listed  # no description is cut


def test_the_demo_says_how_to_go_on(monkeypatch, tmp_path):
    """The environment is to be activated only where ``elmoe`` would not be found otherwise."""
    scripts = Path(sys.prefix) / "bin"
    monkeypatch.chdir(scripts.parent.parent)
    monkeypatch.setenv("PATH", str(tmp_path))
    line = f"  . {scripts.parent.name}/bin/activate\n"
    assert line in demo._next(simulator=True) and "elmoe simulate" in demo._next(simulator=True)
    assert "elmoe simulate" not in demo._next(simulator=False)
    monkeypatch.setenv("PATH", str(scripts))
    following = demo._next(simulator=True)
    assert "activate" not in following and following.startswith("\ngo on with:\n  elmoe generate demo --prompt")
    verbs = re.findall(r"^  elmoe (\w+)", following, re.MULTILINE)
    assert verbs == ["generate", "demo", "generate", "doctor", "simulate"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # no environment that could be activated
    assert "activate" not in demo._next(simulator=True)


def test_the_demo_compares_what_it_measured():
    assert demo._compared({"plain": 50.0, "cache": 100.0, "elastic": 200.0}) == (
        "Here elastic was the fastest: 4.0x plain and 2.0x cache."
    )
    assert (
        demo._compared({"plain": 50.0, "cache": 110.0, "elastic": 100.0})
        == "Here cache and elastic were about equally fast, within 25%."
    )
    assert demo._compared({"plain": 300.0, "cache": 200.0, "elastic": 100.0}).startswith("Here plain was the fastest: 1.5x")


FOUND = {
    "elmoe": "1.2.3", "store": "my-store", "variant": "avx512", "variants": ["avx512", "avx2", "portable"], "cores": 2,
    "available_memory_bytes": 8 * GIB, "store_bytes": 4 * GIB, "memory_read_bytes_per_second_1_threads": 15.678e9,
    "memory_read_bytes_per_second_2_threads": 22.7123456789e9, "prefetch_bytes": 2048, "disk_read_bytes_per_second": 0.5e9,
}  # fmt: skip


def test_doctor_speaks_in_words_and_units(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    lines = dict(doctor._lines(FOUND))
    assert lines == {
        "elmoe": "1.2.3",
        "kernels for this processor": "avx512 (also avx2, portable)",
        "processors to use": "2",
        "memory available": "8.0 GiB",
        "size of the store 'my-store'": "4.0 GiB",
        "memory read by 1 thread": "15.7 GB/s",
        "memory read by 2 threads": "22.7 GB/s",
        "software prefetch": "2.0 KiB ahead",
        "disk read, past the page cache": "0.50 GB/s",
    }
    lines = dict(doctor._lines(FOUND | {"prefetch_bytes": 0, "hardware": "out.yaml", "pass_cost_fit_error": 0.0412}))
    assert lines["software prefetch"] == "off: it does not help here" and lines["hardware description"] == "out.yaml"
    assert lines["mean error of its pass times"] == "4.1%"


def test_doctor_advises(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert doctor._advice(FOUND) == ["The store fits in memory: no --fast-memory is needed."]
    larger = doctor._advice(FOUND | {"store_bytes": 20 * GIB})
    assert larger == [
        "The store is larger than the memory available: try --fast-memory 6.4GiB.",
        "Its disk reads 0.50 GB/s: experts that are not in memory will be slow to come.",
    ]
    assert len(doctor._advice(FOUND | {"store_bytes": 20 * GIB, "disk_read_bytes_per_second": 2e9})) == 1
    assert doctor._advice(FOUND | {"store_bytes": int(7.9 * GIB)})[0].startswith("The store is larger")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    limited = doctor._advice(FOUND | {"variant": "portable"})
    assert limited[0].startswith("This processor has no AVX2") and "may use 2 of 8 processors" in limited[-1]
    assert dict(doctor._lines(FOUND))["processors to use"] == "2 of 8"


def test_doctor_prints_no_python():
    text = told("doctor", "--quick")
    assert "The store fits in memory" in text or "The store is larger" in text
    assert not re.search(r"True|False|None|\{|\}|\d{6}", text) and "size of the store 'demo'" in text


def test_tables_of_simulations_explain_their_words(tmp_path):
    text = told("simulate", "--hardware", "xpu", "--hardware", "elmoe3d_8gb", "--model", "demo", "--prompts", "mt_bench",
                "--batch", "1")  # fmt: skip
    for form in FORMS:
        assert f"{form}: {FORM_WORDS[form]}" in text
    assert "preset: that of the form" in text and "busiest unit: main and fast are the memories" in text
    cells = [line.split("│")[4].strip() for line in text.split("mJ/token")[1].splitlines() if line.startswith("│")]
    assert len(cells) > 5 and all(float(cell) > 0 for cell in cells)  # a small model's joules are not rounded to 0.0
    one = told("simulate", "--hardware", "xpu", "--model", "demo", "--prompts", "mt_bench", "--batch", "1", "--form", "ar")
    assert "ar: nothing, plain decoding" in one and "eagle" not in one and "preset" not in one


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0"), (46.94, "46.9"), (1.0, "1.0"), (0.0123, "0.012"), (1234.5, "1234.5")]
)
def test_small_numbers_keep_digits(value, text):
    assert small_number(value) == text


def test_a_model_preset_can_be_copied_and_changed(tmp_path):
    config = json.loads(told("simulate", "--show-preset", "qwen3-30b-a3b"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"num_experts": 64}))
    rows = json.loads(told("simulate", "--hardware", "xpu", "--model", str(path), "--prompts", "mt_bench", "--batch", "1",
                           "--form", "ar", "--json"))["rows"]  # fmt: skip
    assert rows[0]["model"] == tmp_path.name and rows[0]["tokens_per_second"] > 0
    unknown = CliRunner().invoke(cli, ["simulate", "--show-preset", "nope"])
    assert unknown.exit_code == 2 and "elmoe3d_8gb" in unknown.output and "qwen3-30b-a3b" in unknown.output


def test_inspect_names_budgets_that_can_be_given():
    text = flat(told("inspect", "demo"))
    assert "64 experts per layer, top-4" in text and "upper bits (MSB slices)" in text
    data = json.loads(told("inspect", "demo", "--json"))
    for name, words in (
        ("minimum_fast_memory", "smallest --fast-memory, 64 positions"),
        ("minimum_fast_memory_whole_context", "smallest --fast-memory, whole context of 2048"),
    ):
        assert f"{words} │ {-(-data[name] // 2**20)} MiB" in text
    assert (
        data["minimum_fast_memory_whole_context"] - data["minimum_fast_memory"]
        == (2048 - 64) * data["kv_bytes_per_position"]
    )


def test_a_trace_is_summarised_in_words(tmp_path):
    facts = tmp_path / "run.trace"
    (tmp_path / "prompts.txt").write_text("The whale\n")
    told("trace", "record", "demo", str(facts), "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens", "8")
    text = told("trace", "show", str(facts))
    for words in ("rows by phase", "first tokens of drafts that were accepted", "busiest expert, times the mean"):
        assert words in text
    assert "_" not in text.replace("qwen3_moe", "").replace(str(facts), "")


def test_a_message_of_a_chat_is_on_a_line_of_its_own(tmp_path):
    store = str(templated_store(tmp_path))
    common = ("generate", store, "--prompt", "Who?", "--max-tokens", "4")
    answer = json.loads(told(*common, "--chat", "--json"))["text"]
    assert told(*common, "--chat") == f"Who?\n{answer}\n" and told(*common).startswith("Who?")
    assert told(*common, "--chat", "--quiet") == f"{answer}\n"


def test_titles_of_narrow_tables_are_not_broken(capsys):
    print_table("a title that is much longer than the table below it", ("", "x"), [("a", 1)])
    assert capsys.readouterr().out.splitlines()[0] == "a title that is much longer than the table below it"


def test_a_bar_ends_full(capsys):
    with progress_bar("things", 10) as bar:
        bar(4)
    assert "10/10" in capsys.readouterr().err
    with pytest.raises(ValueError), progress_bar("things", 10) as bar:
        bar(4)
        raise ValueError
    assert "4/10" in capsys.readouterr().err


def test_a_wrong_option_is_told_in_two_lines():
    for words, message in (
        (("generate", "demo", "--batch", "ten"), "error: Invalid value for '--batch': 'ten' is not a whole number"),
        (("generate", "--bogus"), "error: No such option '--bogus'"),
    ):
        ran = run(*words)
        assert ran.returncode == 2 and not ran.stdout
        assert ran.stderr.decode().splitlines() == [message, "hint: elmoe generate --help"]


def test_a_refused_conversion_shows_no_empty_bar(tmp_path, monkeypatch):
    monkeypatch.setattr("elmoe.terminal.SHOWN_AFTER", 60)  # however busy the machine is
    (tmp_path / "a.gguf").write_text("hi")
    ran = run("convert", str(tmp_path / "a.gguf"), str(tmp_path / "store"))
    assert ran.returncode == 1 and ran.stderr.decode().splitlines()[0] == "error: 'a.gguf' is no GGUF file"


def test_texts_stand_side_by_side_where_there_is_room(monkeypatch, capsys):
    from elmoe.terminal import print_texts

    texts = {"plain": ["one two", "three"], "elastic": ["one two", "three"]}
    print_texts(("A ", "B "), texts, 96)
    assert capsys.readouterr().out.split() == ["A", "one", "two", "B", "three"]  # to a pipe: once
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    print_texts(("A ", "B "), texts, 96)
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines() if line.strip()]
    assert lines == [["plain", "elastic"], ["A", "one", "two"] * 2, ["B", "three"] * 2]


def test_control_characters_of_names_do_not_reach_the_terminal():
    ran = run("generate", "\x1b[31mred", "--prompt", "x")
    assert ran.returncode == 1 and b"\x1b" not in ran.stderr and b"\\x1b[31mred" in ran.stderr
