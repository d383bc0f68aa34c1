"""`lorafit` and `python -m lorafit`."""

import sys


def run() -> None:
    """Import the command line, which takes a moment, and run it."""
    try:
        from lorafit.cli.main import main
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    main()


if __name__ == "__main__":
    run()
