"""`python -m lorascope` and the `lorascope` command."""

import sys

from lorascope.cli.app import main


def run() -> None:
    """Run the command line and exit with its code."""
    sys.exit(main())


if __name__ == "__main__":
    run()
