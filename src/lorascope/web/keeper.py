"""The process around one command of the queue: it outlives the server, and writes down how the command ended.

Command:  python -m lorascope.web.keeper JOB_FOLDER

The folder holds `job.json` {arguments, cwd}. The keeper writes `started.json` {keeper, keeper_born, command,
command_born}, the command's stdout to `output`, its stderr to `log`, and at the end `result.json`
{exit_code, ended}.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

from lorascope.store import write_json


def keep(folder: Path) -> int:
    """Run the command of a job folder to its end; a SIGTERM or Ctrl-C is passed on to it."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    with (folder / "output").open("wb") as output, (folder / "log").open("ab") as log:
        command = subprocess.Popen(
            [sys.executable, "-m", "lorascope", *job["arguments"]],
            cwd=job["cwd"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
        )

    def pass_on(number: int, frame: FrameType | None) -> None:
        command.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    write_json(
        folder / "started.json",
        {
            "keeper": os.getpid(),
            "keeper_born": psutil.Process().create_time(),
            "command": command.pid,
            "command_born": _born(command.pid),
        },
    )
    exit_code = command.wait()
    write_json(folder / "result.json", {"exit_code": exit_code, "ended": time.time()})
    return 0


def _born(number: int) -> float:
    """When a process started, 0 where it ended at once."""
    try:
        return float(psutil.Process(number).create_time())
    except psutil.Error:
        return 0.0


if __name__ == "__main__":
    sys.exit(keep(Path(sys.argv[1])))
