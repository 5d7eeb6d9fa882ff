"""Schemathesis over the server's own OpenAPI description: no 500, no hang, answers as described.

python -m tests.server.described [--examples 200]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.server.live import LiveServer
from tests.templated import templated_store

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
"""What every answer must be. Left out: that the description accepts exactly what the server does; limits of the model (its
context, its vocabulary) are not in it."""


def main() -> None:
    """Run it; exit status 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200)
    wanted = parser.parse_args()
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", "--checks", CHECKS, "--request-timeout", "300"]
    with (
        TemporaryDirectory() as folder,
        LiveServer(str(templated_store(Path(folder))), "--model-name", "m", "--timeout", "300") as server,
    ):
        run = subprocess.run(
            [*command, "--max-examples", str(wanted.examples), "--suppress-health-check", "all",
             "--url", server.url, f"{server.url}/openapi.json"], cwd=folder,
        )  # fmt: skip
        failed = [line for line in server.log() if line.get("status", 0) >= 500 or "traceback" in line]
    for line in failed[:5]:
        print("the server's log:", line)
    sys.exit(run.returncode or bool(failed))


if __name__ == "__main__":
    main()
