"""`python -m lorascope` and the `lorascope` command."""

import sys
from io import TextIOWrapper

from lorascope.cli.app import main


def run() -> None:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # code pages of Windows lack many letters
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())


if __name__ == "__main__":
    run()
