"""An install without the optional dependencies: text is generated, and what needs more names the extra in two lines."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from elmoe.extras import EXTRAS, missing_extra
from tests import command

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = "import sys; sys.modules.update(dict.fromkeys({modules!r}));"


def without(modules: tuple[str, ...], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in which the modules cannot be imported."""
    code = BLOCKED.format(modules=modules) + code
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)


def verb(*arguments: str, modules: tuple[str, ...] = EXTRAS["sim"]) -> subprocess.CompletedProcess[str]:
    return without(modules, "from elmoe.cli.main import main; main()", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate", "--hardware", "xpu", "--model", "qwen3-30b-a3b"),
        ("report", "{result}"),
        ("trace", "show", "{prompts}"),
        ("trace", "record", "demo", "{out}", "--prompts", "{prompts}"),
        ("generate", "demo", "--prompt", "The", "--max-tokens", "2", "--trace", "{out}"),
        ("doctor", "--quick", "--hardware", "{out}"),
        ("demo", "--max-tokens", "2", "--report", "{out}"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_verb_without_its_extra_says_which(arguments, tmp_path):
    result = tmp_path / "result.json"
    if arguments[0] == "report":
        wanted = ("simulate", "--hardware", "xpu", "--model", "qwen3-30b-a3b", "--prompts", "mt_bench", "--batch", "1")
        written = verb(*wanted, "--out", str(result), modules=())
        assert written.returncode == 0, written.stderr
    (tmp_path / "prompts.txt").write_text("The whale\n")
    names = {"result": result, "out": tmp_path / "out", "prompts": tmp_path / "prompts.txt"}
    run = verb(*(word.format(**names) for word in arguments))
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    error, hint = run.stderr.strip().splitlines()[-2:]
    subject = "the table of described hardware" if arguments[0] == "demo" else f"elmoe {arguments[0]}"
    assert error.startswith(f"error: {subject} needs '") and "which is not installed" in error, run.stderr
    assert hint.startswith("hint: ") and "pip install 'elmoe[sim]'" in hint, run.stderr
    assert not (tmp_path / "out").exists()


def test_the_server_names_its_extra():
    run = verb("serve", "demo", modules=EXTRAS["server"])
    error, hint = run.stderr.strip().splitlines()
    assert run.returncode == 1 and error.startswith("error: elmoe serve needs '") and "'elmoe[server]'" in hint, run.stderr


@pytest.mark.parametrize("module", EXTRAS["sim"])
def test_an_extra_that_is_half_installed_is_named_with_what_lacks(module, tmp_path):
    result, out = tmp_path / "result.json", tmp_path / "out"
    arguments = ("simulate", "--hardware", "xpu", "--model", "demo", "--prompts", "mt_bench", "--batch", "1", "--form", "ar")
    if module == "plotly":
        assert command.run(*arguments, "--out", str(result)).returncode == 0
        arguments = ("report", str(result))
    run = verb(*arguments, "--out", str(out), modules=(module,))
    error, hint = run.stderr.strip().splitlines()[-2:]
    assert error == f"error: elmoe {arguments[0]} needs '{module}', which is not installed" and "elmoe[sim]" in hint
    assert run.returncode == 1 and not out.exists()


@pytest.mark.parametrize("arguments", [("generate", "demo", "--prompt", "The"), ("inspect", "demo"), ("doctor",), ("demo",)])
def test_missing_native_kernels_are_told_in_two_lines(arguments):
    run = verb(*arguments, modules=("elmoe._native",))
    error, hint = run.stderr.strip().splitlines()
    assert run.returncode == 1 and error.startswith("error: the native kernels are missing") and "compiler" in hint
    assert verb("--help", modules=("elmoe._native",)).returncode == 0


def test_text_needs_no_extra():
    run = verb("generate", "demo", "--prompt", "The whale", "--max-tokens", "4", "--json")
    assert run.returncode == 0 and json.loads(run.stdout), run.stderr


def test_the_demo_leaves_out_its_table_of_hardware_and_says_so():
    run = verb("demo", "--max-tokens", "2")
    assert run.returncode == 0 and "identical output: yes" in run.stdout, run.stderr
    assert "Qwen3-30B-A3B on described hardware" not in run.stdout and "pip install 'elmoe[sim]'" in run.stderr
    assert json.loads(verb("demo", "--max-tokens", "2", "--json").stdout)["projection"] is None


def test_from_python_a_trace_names_the_extra(tmp_path):
    code = (
        "import elmoe\n"
        "try: elmoe.load('demo').generate('The', max_tokens=2, trace=sys.argv[1])\n"
        "except elmoe.errors.MissingExtraError as error: print(error, error.hint)\n"
    )
    run = without(("pyarrow",), "\n" + code, str(tmp_path / "trace"))
    assert "'pyarrow'" in run.stdout and "elmoe[sim]" in run.stdout, run.stderr


@pytest.mark.parametrize("name", ["generate", "stream", "chat", "offload"])
def test_examples_of_text_need_no_extra(name):
    run = without(EXTRAS["sim"], f"import runpy; runpy.run_path({str(ROOT / 'examples' / f'{name}.py')!r})")
    assert run.returncode == 0 and not run.stderr, run.stderr


@pytest.mark.parametrize("name", ["trace", "simulate"])
def test_other_examples_name_the_extra(name):
    run = without(EXTRAS["sim"], f"import runpy; runpy.run_path({str(ROOT / 'examples' / f'{name}.py')!r})")
    *_, error, hint = run.stderr.strip().splitlines()
    assert run.returncode == 1 and "MissingExtraError" in error and "which is not installed" in error, run.stderr
    assert hint.startswith("hint: ") and "pip install 'elmoe[sim]'" in hint, run.stderr


def test_a_broken_install_is_not_called_an_extra():
    assert missing_extra("numpy", "elmoe generate") is None
    run = verb("generate", "demo", "--prompt", "The", modules=("tokenizers",))
    assert run.returncode == 1 and "ModuleNotFoundError" in run.stderr


def test_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distributions = {"yaml": "pyyaml", "prometheus_client": "prometheus-client", "prompt_toolkit": "prompt-toolkit"}
    for extra, modules in EXTRAS.items():
        brought = {item.split(">")[0] for item in project["optional-dependencies"][extra]}
        assert brought == {distributions.get(module, module) for module in modules}
        assert not brought & {item.split(">")[0] for item in project["dependencies"]}
        assert f"elmoe[{extra}]" in project["optional-dependencies"]["all"]
