"""``python -m elmoe``: the command line."""

from elmoe.cli.main import main

if __name__ == "__main__":
    main()
