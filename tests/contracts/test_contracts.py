"""Promises about the package itself: light imports, native kernels present, verbs and documents in step."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import elmoe
from elmoe.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[2]


def fresh(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_loads_nothing_heavy():
    """What keeps ``elmoe --help`` under 0.2 s: no NumPy, Arrow, tokenizers or rich before a verb runs."""
    loaded = fresh("import sys; import elmoe.cli.main; print(' '.join(sys.modules))").split()
    assert not {"numpy", "pyarrow", "tokenizers", "rich", "msgspec", "jinja2"} & set(loaded)


def test_the_package_loads_nothing_until_a_name_is_used():
    loaded = fresh("import sys; before = set(sys.modules); import elmoe; print(' '.join(set(sys.modules) - before))").split()
    assert [name for name in loaded if name.startswith("elmoe")] == ["elmoe"] and not {"numpy", "msgspec"} & set(loaded)
    for name in elmoe.__all__:
        loaded = fresh(f"import sys, elmoe; elmoe.{name}; print(' '.join(sys.modules))").split()
        assert not {"pyarrow", "plotly", "jinja2", "torch", "click", "rich", "gguf"} & set(loaded), name


def test_types_are_published_for_every_public_name():
    folder = Path(elmoe.__file__).parent
    stub = (folder / "__init__.pyi").read_text()
    assert (folder / "py.typed").exists()
    assert set(elmoe.__all__) == set(re.findall(r"import \w+ as (\w+)", stub))
    for name in elmoe.__all__:
        assert inspect.getdoc(getattr(elmoe, name)), name


def test_generation_loads_no_arrow_and_nothing_loads_torch():
    loaded = fresh("import sys; import elmoe.llm; print(' '.join(sys.modules))").split()
    assert not {"pyarrow", "torch", "transformers"} & set(loaded)


def test_native_kernels_are_present():
    """A broken compiler must fail here, not fall back."""
    from elmoe import kernels

    assert "portable" in kernels.variants() and kernels.variant() in kernels.variants()


def test_both_backends_have_the_signatures_of_the_protocol():
    """mypy checks the types; this checks that a call by the protocol's names and order reaches both."""
    from elmoe import bitslice, kernels

    methods = [name for name in vars(bitslice.Backend) if not name.startswith("_")]
    assert methods == ["embed", "forward", "logits", "sample"]
    for name in methods:
        stated = inspect.signature(getattr(bitslice.Backend, name)).parameters
        wanted = [(one.name, one.kind, one.default) for one in stated.values()][1:]
        for backend in (bitslice, kernels):
            found = inspect.signature(getattr(backend, name)).parameters
            given = [(one.name, one.kind, one.default) for one in found.values() if one.name != "operations"]
            assert given == wanted, f"{backend.__name__}.{name}"


def test_backends_are_typed_not_probed():
    for path in (ROOT / "src" / "elmoe").rglob("*.py"):
        text = path.read_text()
        assert "hasattr(" not in text and "cast(ModuleType" not in text, path


def test_the_package_version_is_the_metadata_version():
    from importlib.metadata import version

    assert version("elmoe") == elmoe.__version__


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_json_and_a_section_in_the_reference(verb):
    run = subprocess.run(
        [sys.executable, "-m", "elmoe.cli.main", verb, "--help"], capture_output=True, text=True, check=True
    )
    assert "--json" in run.stdout
    reference = (ROOT / "docs" / "cli.md").read_text()
    assert f"| [`elmoe {verb}`](#elmoe-{verb}) |" in reference and f"\n## elmoe {verb}\n" in reference


def test_the_reference_is_what_the_commands_say():
    """To mend it: ``python -m tools.cli_reference``."""
    run = subprocess.run([sys.executable, "-m", "tools.cli_reference", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_links_in_the_documents_lead_somewhere():
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_tree_in_the_documentation_exists():
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = text[text.index("## What is where") :].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        name = line.split()[0]
        folder = ROOT / "src" / "elmoe" if line.startswith("  ") else ROOT
        assert (folder / name).is_dir(), name


def test_every_package_says_what_it_is():
    for package in (ROOT / "src" / "elmoe").rglob("__init__.py"):
        assert package.read_text().lstrip().startswith('"""'), package


def test_compiled_code_has_no_fused_multiply_add():
    """Contraction would change bits between instruction sets."""
    import shutil

    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    (library,) = {Path(line) for line in [fresh("import elmoe._native as n; print(n.__file__)").strip()]}
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
    )
    assert "vpdpbusd" in listing.stdout or "x86" not in sys.platform
    assert not re.search(r"\bvfn?m(add|sub)", listing.stdout)


def test_version_of_citation_and_changelog():
    assert f"\nversion: {elmoe.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {elmoe.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_every_page_is_in_the_navigation_of_the_site():
    listed = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("docs/*.md"))


def test_workflows_run_targets_and_programs_that_exist():
    import yaml

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = []
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            commands += [step["run"].split() for step in job["steps"] if "run" in step]
    assert len(commands) >= 5
    for words in commands:
        assert words[1] in targets if words[0] == "make" else (ROOT / words[0]).is_file(), words


def test_the_log_is_newest_first_and_wrapped():
    lines = (ROOT / "docs" / "log.md").read_text().splitlines()
    dates = [line[2:12] for line in lines if line.startswith("- ")]
    assert len(dates) > 90 and dates == sorted(dates, reverse=True)
    assert max(map(len, lines)) <= 125


def test_cited_commits_are_in_the_history():
    """History may be rewritten before it is published; what documents cite must be there afterwards."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no whole history is here")
    cited = set()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for told in re.findall(
            r"\bcommits? ([0-9a-f]{7}\b(?:,? (?:and )?[0-9a-f]{7}\b)*)", " ".join(path.read_text().split())
        ):
            cited |= set(re.findall(r"[0-9a-f]{7}", told))
    assert len(cited) > 5
    assert not [one for one in cited if git("merge-base", "--is-ancestor", one, "HEAD").returncode]
