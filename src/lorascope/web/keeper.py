"""The process around one command of the queue: it outlives the server, and writes down how the command ended.

Command:  python -m lorascope.web.keeper JOB_FOLDER

The folder holds `job.json` {arguments, cwd}. The keeper writes `started.json` {keeper, command} (numbers of
processes), the command's stdout to `output`, its stderr to `log`, and at the end `result.json` {exit_code,
ended}. Signals pass it by: whoever wants the command to stop asks the command.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lorascope.errors import StorageError
from lorascope.store import write_json

_TRY_AGAIN_S = 2.0
_NUM_TRIES = 1800


def keep(folder: Path) -> int:
    """Run the command of a job folder to its end.

    Raises `StorageError` where it cannot be noted that the command runs, which is stopped then, or, after an
    hour, how it ended.
    """
    # Handlers: what is ignored here would be ignored by the command too.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    with (folder / "output").open("wb") as output, (folder / "log").open("ab") as log:
        command = subprocess.Popen(
            command_line(job["arguments"]),
            cwd=job["cwd"],
            env={**os.environ, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
        )
    try:
        write_json(folder / "started.json", {"keeper": os.getpid(), "command": command.pid})
    except StorageError:
        command.terminate()
        command.wait()
        raise
    exit_code = command.wait()
    result = {"exit_code": exit_code, "ended": time.time()}
    for _ in range(_NUM_TRIES):  # a full disk gets room again
        try:
            write_json(folder / "result.json", result)
            return 0
        except StorageError:
            time.sleep(_TRY_AGAIN_S)
    write_json(folder / "result.json", result)
    return 0


def command_line(arguments: list[str]) -> list[str]:
    """A command of lorascope's as a process; `-P`: files in the working folder are no modules."""
    return [sys.executable, "-P", "-m", "lorascope", *arguments]


if __name__ == "__main__":
    sys.exit(keep(Path(sys.argv[1])))
