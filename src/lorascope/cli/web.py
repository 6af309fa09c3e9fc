"""`lorascope web`: the web app."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from lorascope.cli.options import Verbose, set_level
from lorascope.errors import EXIT_DONE, ConfigError


def web(
    folder: Annotated[
        Path, Parameter(help="folder to work in: runs/, studies/, pictures/ and files/ lie in it")
    ] = Path("."),
    *,
    port: Annotated[
        int, Parameter(help="port; 0 takes a free one", validator=Number(gte=0, lte=65535))
    ] = 7860,
    listen: Annotated[
        str | None,
        Parameter(help="address to listen on in place of 127.0.0.1, such as 0.0.0.0 for all networks"),
    ] = None,
    host_name: Annotated[
        list[str] | None,
        Parameter(help="further name that browsers know this machine by; may be repeated", negative=""),
    ] = None,
    allow: Annotated[
        list[Path] | None,
        Parameter(help="folder that may be looked into; may be repeated", negative=""),
    ] = None,
    browser: Annotated[bool, Parameter(help="open the page in a browser", negative="")] = False,
    verbose: Verbose = False,
) -> int:
    """Open lorascope in a browser: from a folder of pictures to the right file, without a study file.

    What runs is a command of its own that goes on when the browser or the server ends; the page of a run
    prints it. Without --listen only this machine can connect; folders below the working folder and, then,
    below your home folder may be looked into.

    For example:

    lorascope web                              serve the current folder on http://127.0.0.1:7860

    lorascope web studies --allow /mnt/pictures --port 8000
    """
    set_level(False, verbose)
    try:
        from lorascope.web.app import Options, serve
        from lorascope.web.workspace import Workspace
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("lorascope"):
            raise
        raise ConfigError(
            f"lorascope web needs {error.name}, which is not installed: pip install 'lorascope[web]'"
        ) from error
    home = Path("~").expanduser()
    allowed = [*(allow or []), *([home] if not listen and home.is_dir() else [])]
    options = Options(listen or "127.0.0.1", port, tuple(host_name or ()), browser)
    serve(Workspace.open(folder, allowed), options)
    return EXIT_DONE
