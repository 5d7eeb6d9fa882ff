"""``elmoe`` and ``python -m elmoe``: the command line."""

import sys


def main() -> None:
    """Load the command line and run it; Ctrl-C while it is loaded is no fault either."""
    try:
        from elmoe.cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
