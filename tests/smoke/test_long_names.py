"""Names that no file system has, wherever a verb takes a path: two lines, no traceback."""

from __future__ import annotations

import pytest

from tests.command import run as elmoe

QUICK = ("simulate", "--hardware", "xpu", "--model", "gpt-oss-20b", "--prompts", "gsm8k", "--batch", "1", "--form", "ar")
ONE = ("--max-tokens", "1")
LONG = "<long>"
COMMANDS = (
    ("simulate", "--hardware", LONG), ("simulate", "--model", LONG), (*QUICK[:5], "--prompts", LONG),
    (*QUICK, "--out", LONG),
    (*QUICK, "--timeline", LONG), (*QUICK, "--trace", LONG), (*QUICK, "--acceptance", LONG), ("convert", LONG, "out"),
    ("convert", "here", LONG), ("convert", "here", "out", "--tokenizer", LONG), ("export", LONG, "out.gguf"),
    ("export", "demo", LONG), ("synth", LONG, "out"), ("synth", "here", LONG), ("inspect", LONG),
    ("doctor", "--quick", "--hardware", LONG), ("demo", "--report", LONG), ("generate", LONG, "--prompt", "x"),
    ("generate", "demo", "--prompt", "x", *ONE, "--trace", LONG), ("generate", "demo", "--prompt", f"@{LONG}", *ONE),
    ("generate", "demo", "--prompts", LONG, *ONE), ("eval", LONG, "--text", "here"), ("eval", "demo", "--text", LONG),
    ("chat", LONG), ("serve", LONG), ("trace", "show", LONG), ("trace", "record", "demo", LONG, "--prompts", "here"),
    ("trace", "record", "demo", "out", "--prompts", LONG), ("trace", "import", LONG, "out"),
    ("trace", "synthesise", LONG, "out", "--experts", "8", "--top-k", "2", "--layers", "2"), ("report", LONG),
    ("report", "here", "--out", LONG), ("bench", LONG), ("bench", "demo", "--replay", LONG), ("cache", "remove", LONG),
)  # fmt: skip


@pytest.mark.parametrize("name", ["z" * 300, "y/" * 2500 + "z"], ids=["name", "path"])
def test_a_name_that_no_file_can_have_is_told(tmp_path, name):
    (tmp_path / "here").write_text("{}")
    for command in COMMANDS:
        done = elmoe(*(word.replace(LONG, name) for word in command), cwd=tmp_path)
        assert done.returncode in (1, 2) and 1 <= done.stderr.count(b"\n") <= 6, (command, done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
