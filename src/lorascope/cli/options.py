"""Options that several commands share."""

import logging
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lorascope.config import preset_names
from lorascope.console import configure_logging

Run = Annotated[Path, Parameter(help="run folder, such as runs/pocket")]
Preset = Annotated[str | None, Parameter(help=f"preset to start from: {', '.join(preset_names())}")]
Overrides = Annotated[
    list[str] | None,
    Parameter(
        name=["--set", "-s"], help="key=value, for example --set train.epochs=2; may be repeated", negative=""
    ),
]
AsJson = Annotated[bool, Parameter(name="--json", help="print the result as JSON", negative="")]
Quiet = Annotated[bool, Parameter(name=["--quiet", "-q"], help="print the result's path only", negative="")]
Verbose = Annotated[bool, Parameter(name=["--verbose", "-v"], help="log details", negative="")]


def set_level(quiet: bool, verbose: bool) -> None:
    """Log warnings only, or details too, on stderr."""
    configure_logging(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
