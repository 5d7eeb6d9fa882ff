"""Outputs, signals and scripts: what a shell user expects of every verb."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests.command import run as elmoe

QUICK = ("--hardware", "xpu", "--model", "gpt-oss-20b", "--prompts", "gsm8k", "--batch", "1", "--form", "ar")


def process(*arguments, module="elmoe", **environment):
    """The command in an interpreter of its own, as a shell starts it."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, timeout=300, env=os.environ | environment
    )


def told(done):
    """Standard error of a run that was refused in two lines."""
    text = done.stderr.decode("utf-8", "replace")
    assert done.returncode in (1, 2) and "Traceback" not in text, text
    return text


def test_the_package_is_a_command():
    assert process("--help").stdout == process("--help", module="elmoe.cli.main").stdout != b""


@pytest.mark.parametrize(
    ("words", "near"),
    [(("simulat",), "simulate"), (("trace", "shw"), "show"), (("genrate",), "generate"), (("xyzzy",), "demo")],
)
def test_a_mistyped_verb_is_answered_with_the_nearest(words, near):
    assert near in told(elmoe(*words))


def test_an_output_that_exists_is_kept_without_force(tmp_path):
    result = tmp_path / "r.json"
    assert elmoe("simulate", *QUICK, "--out", str(result)).returncode == 0
    before = result.read_bytes()
    page = tmp_path / "page.html"
    page.write_text("old")
    for arguments in (
        ("simulate", *QUICK, "--out", str(result)),
        ("simulate", *QUICK, "--timeline", str(result)),
        ("report", str(result), "--out", str(page)),
        ("generate", "demo", "--prompt", "x", "--trace", str(result)),
        ("generate", "demo", "--prompt", "x", "--timeline", str(result)),
        ("trace", "record", "demo", str(result), "--prompts", str(page)),
        ("trace", "synthesise", "mt_bench", str(result), "--experts", "8", "--top-k", "2", "--layers", "2"),
        ("trace", "profile", "demo", str(result), "--prompts", str(page)),
        ("doctor", "--quick", "--hardware", str(result)),
        ("demo", "--report", str(page)),
        ("export", "demo", str(result)),
    ):
        assert "exists already" in told(elmoe(*arguments)), arguments
    assert result.read_bytes() == before and page.read_text() == "old"
    assert elmoe("report", str(result), "--out", str(page), "--force").returncode == 0 and b"<html" in page.read_bytes()


def test_outputs_that_cannot_be_written_are_told_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "config.json").write_text("{}")
    for place in (tmp_path / "file" / "x", tmp_path / "no" / "x"):
        for arguments in (
            ("simulate", *QUICK, "--out", str(place)),
            ("generate", "demo", "--prompt", "x", "--timeline", str(place)),
            ("doctor", "--quick", "--hardware", str(place)),
        ):
            done = elmoe(*arguments)
            assert "cannot write" in told(done) and done.stdout == b""
    for arguments in (("convert", str(tmp_path)), ("synth", str(tmp_path / "config.json")), ("export", "demo")):
        assert "cannot write" in told(elmoe(*arguments, str(tmp_path / "file" / "x")))


def test_a_pipe_and_a_link_as_outputs(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.json").symlink_to("real.json")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    assert elmoe("simulate", *QUICK, "--out", str(tmp_path / "pipe")).returncode == 0
    assert json.loads(reader.communicate(timeout=60)[0])["label"] == "simulated"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert elmoe("simulate", *QUICK, "--out", str(tmp_path / "link.json")).returncode == 0
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_bytes())["rows"]


def test_text_that_is_not_utf_8_is_refused_and_names_that_are_not_are_shown(tmp_path):
    for arguments in (
        ("generate", "demo", "--prompt", b"caf\xe9"),
        ("generate", "demo", "--prompt", "x", "--stop", b"\xe9"),
        ("generate", "demo", "--prompt", b"\xed\xa0\xbd\xed\xb8\x80", "--json"),
    ):
        assert "not UTF-8" in told(elmoe(*arguments))
    assert b"\\udce9" in elmoe("inspect", os.fsencode(tmp_path) + b"/st\xe9").stderr
    (tmp_path / "p.txt").write_bytes(b"caf\xe9\n")
    assert "not text" in told(elmoe("trace", "record", "demo", str(tmp_path / "o"), "--prompts", str(tmp_path / "p.txt")))
    assert "not text" in told(elmoe("eval", "demo", "--text", str(tmp_path / "p.txt")))


def test_a_terminal_that_is_not_utf_8_gets_all_output():
    done = process("generate", "demo", "--prompt", "naïve 東京", "--max-tokens", "4", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and done.stdout.startswith(b"na\xefve \\u6771\\u4eac")
    for arguments in (("inspect", "demo"), ("simulate", *QUICK), ("simulate", "--show-preset", "elmoe3d_8gb")):
        assert elmoe(*arguments, PYTHONIOENCODING="ascii").returncode == 0


@pytest.mark.parametrize("name", ["box [idle]", "box [/b]", "box [8 GB]", "[red]x[/red]"])
def test_names_in_brackets_are_shown_as_they_are(tmp_path, name):
    preset = elmoe("simulate", "--show-preset", "xpu").stdout.decode()
    (tmp_path / "h.yaml").write_text(preset.replace("name: xpu\n", f'name: "{name}"\n'))
    done = elmoe("simulate", "--hardware", str(tmp_path / "h.yaml"), *QUICK[2:])
    assert done.returncode == 0 and name in done.stdout.decode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "demo", "--prompt", "x", "--trace", "one", "--timeline", "./one"), "name the same file"),
        (("generate", "demo", "--prompt", "x", "--mode", "plain", "--draft-length", "4"), "--draft-length needs --mode"),
        (("generate", "demo", "--prompt", "x", "--logit-bias", "5=1e9"), "is not in the range -100<=x<=100"),
        (("generate", "demo", "--prompt", "@"), "--prompt @ names no file"),
        (("generate", "demo", "--prompt", "x", "--json-schema", "no.json"), "'no.json': the JSON schema"),
        (("generate", "demo", "--prompts", "two.jsonl"), "two.jsonl, line 1 is no prompt: 'temperature' is not read"),
        (("generate", "demo", "--prompts", "empty.jsonl"), "empty.jsonl, line 1 is an empty prompt"),
        (("generate", "demo", "--prompt", "x", "--store-dir", ""), "the name is empty"),
        (("chat", "demo", "--model", "x"), "--model needs the URL of a server"),
        (("chat", "http://127.0.0.1:9", "--mode", "plain"), "--mode is for a model of this process"),
        (("export", "source.gguf", "source.gguf", "--force"), "is the file that is read"),
        (("export", "store", "store/manifest.json", "--force"), "is a file of 'store' itself"),
        (("bench", "demo", "--modes", "plain,cache", "--draft-length", "3"), "--draft-length needs --mode elastic"),
        (("generate", "demo", "--prompt", "x", "--logit-bias", "5=abc"), "is no token id and number"),
        (("serve", "demo", "--cors-origins", "https://a.b/"), "is no origin"),
        (("serve", "demo", "--api-key", " "), "--api-key is empty"),
        (("serve", "demo", "--timeout", "nan"), "is no number"),
        (("serve", "demo", "--max-body", "0B"), "at least 1.0 KiB are needed"),
        (("serve", "demo", "--model-name", ""), "--model-name is empty"),
        (("serve", "demo", "--cors-origins", "wat"), "'wat' is no origin"),
    ],
)
def test_what_would_be_ignored_or_lost_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "source.gguf").write_bytes(b"GGUF")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    (tmp_path / "two.jsonl").write_text('{"prompt": "a", "temperature": 0.5}\n')
    (tmp_path / "empty.jsonl").write_text('""\n')
    before = sorted(os.listdir(tmp_path))
    assert message in told(elmoe(*arguments)) and sorted(os.listdir(tmp_path)) == before


def test_a_file_is_exported_over_another_with_force_alone(tmp_path):
    out = tmp_path / "demo.gguf"
    out.write_bytes(b"old")
    assert "exists already" in told(elmoe("export", "demo", str(out))) and out.read_bytes() == b"old"
    assert elmoe("export", "demo", str(out), "--force").returncode == 0 and out.read_bytes()[:4] == b"GGUF"


def test_numbers_too_large_for_their_type_are_refused(tmp_path):
    for arguments in (
        ("--fast-memory", "9" * 400 + "GiB"), ("--slow-bandwidth", "9" * 400 + "GB/s"), ("--seed", "9" * 30),
        ("--max-tokens", "9" * 30), ("--top-k", "9" * 30), ("--temperature", "nan"), ("--top-p", "inf"),
    ):  # fmt: skip
        told(elmoe("generate", "demo", "--prompt", "x", *arguments))
    for batch in ("9" * 5000, "1,-1", "1_0", "0", ""):
        told(elmoe("simulate", *QUICK[:6], "--batch", batch))
    assert "25%" in told(elmoe("generate", "demo", "--prompt", "x", "--fast-memory", "25"))


def test_json_is_of_one_shape_whatever_the_number_of_prompts():
    common = ("generate", "demo", "--max-tokens", "3", "--json", "--prompt", "The whale")
    one, two = json.loads(elmoe(*common).stdout), json.loads(elmoe(*common, "--prompt", "hi").stdout)
    assert set(one) == set(two) and len(one["results"]) == 1 and len(two["results"]) == 2
    assert one["text"] == one["results"][0]["text"] == two["results"][0]["text"] == two["text"]


def test_a_text_says_why_it_ended(tmp_path):
    done = elmoe("generate", "demo", "--prompt", "The whale", "--max-tokens", "3")
    assert b"ended by: --max-tokens" in done.stderr
    text = done.stdout.decode().strip().removeprefix("The whale")
    done = elmoe("generate", "demo", "--prompt", "The whale", "--max-tokens", "9", "--stop", text.strip()[-1])
    assert b"ended by: a stop string" in done.stderr


def session_seconds(leader):
    """Seconds of CPU that each process of a session has taken, by process id."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    words = file.read().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(words[3]) == leader and words[0] != "Z":
                found[int(entry)] = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return found


def control_c(process):
    """As from a terminal: all processes of the session are told."""
    os.killpg(process, signal.SIGINT)


def interrupted(*arguments, begun, end=control_c):
    """Exit code, output and seconds of processor time to the end of a run that is ended once ``begun``, which is given the
    process id and standard output so far, says so."""
    process = subprocess.Popen(
        [sys.executable, "-m", "elmoe", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    seen, taken = {process.stdout: b"", process.stderr: b""}, {}

    def look():
        for pipe in select.select(list(seen), [], [], 0.05)[0]:
            seen[pipe] += os.read(pipe.fileno(), 1 << 16)
        taken.update(now := session_seconds(process.pid))
        return now

    while not begun(process.pid, seen[process.stdout]):
        assert process.poll() is None, seen
        look()
    end(process.pid)
    before = sum(taken.values())
    until = time.monotonic() + 300
    while look():  # workers are told to end, not waited for
        assert time.monotonic() < until, "a process is left"
    out, err = process.communicate()
    assert b"Traceback" not in seen[process.stderr] + err
    return process.returncode, (seen[process.stdout] + out).decode(), sum(taken.values()) - before


def test_ctrl_c_ends_quickly_with_130_and_the_text_so_far():
    prompts = [word for n in range(40) for word in ("--prompt", f"The whale {n}")]
    code, out, seconds = interrupted(
        "generate", "demo", *prompts, "--max-tokens", "1900", "--ignore-eos", begun=lambda _, out: len(out) > 200
    )
    assert code == 130 and seconds < 10 and out.startswith("The whale 0") and "The whale 9" in out  # those begun


def test_ctrl_c_while_the_command_line_is_loaded_is_no_traceback():
    code = """
import sys
class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == "elmoe.cli.main":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
from elmoe.__main__ import main
main()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"elmoe": "elmoe.__main__:main"}


def workers_compute(leader, _):
    """All systems, models and prompts take minutes; a worker that has computed for a while is past its start."""
    return any(seconds > 0.2 for process, seconds in session_seconds(leader).items() if process != leader)


def test_ctrl_c_ends_a_simulation_with_its_workers():
    code, _, seconds = interrupted("simulate", begun=workers_compute)
    assert code == 130 and seconds < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_where_their_parent_alone_is_ended(number):
    code, _, seconds = interrupted("simulate", begun=workers_compute, end=lambda process: os.kill(process, number))
    assert code == -number and seconds < 10


@pytest.mark.parametrize("arguments", [("inspect", "demo", "--json"), ("--help",), ("simulate", "--show-preset", "xpu")])
def test_a_reader_that_goes_away_is_no_error(arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "elmoe", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) in (0, 1) and not any(word in err for word in (b"Traceback", b"BrokenPipe", b"Exception"))
    process.stderr.close()


def test_a_full_disk_behind_stdout_is_told():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "elmoe", "simulate", "--show-preset", "xpu"], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 1 and b"No space left" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("columns", [20, 40])
def test_a_narrow_terminal_never_cuts_a_number(columns):
    def on_terminal(width):
        main, other = pty.openpty()
        environment = os.environ | {"COLUMNS": str(width), "TERM": "dumb", "NO_COLOR": "1"}
        arguments = ("simulate", *QUICK[:6], "--batch", "1,2,4,8,16", "--form", "ar")
        process = subprocess.Popen(
            [sys.executable, "-m", "elmoe", *arguments], stdout=other, stderr=subprocess.DEVNULL, env=environment
        )
        os.close(other)
        out = b""
        while True:
            try:
                part = os.read(main, 4096)
            except OSError:
                break
            if not part:
                break
            out += part
        os.close(main)
        assert process.wait(60) == 0
        return out.decode()

    wide, narrow = on_terminal(200), on_terminal(columns)
    numbers = [word for word in wide.replace("│", " ").split() if "." in word and word[0].isdigit()]
    assert len(numbers) >= 5 and all(word in narrow for word in numbers) and "…" not in narrow
