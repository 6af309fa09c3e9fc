"""The command line: its commands by help group, and errors as one line and an exit code.

Results go to stdout, progress and logs to stderr; heavy imports happen inside the commands.
"""

import os
import signal
import sys
import traceback
from typing import Any

from cyclopts import App, CycloptsError, Group

from lorascope import __version__
from lorascope.cli import files, more, pictures, stages
from lorascope.cli.doctor import doctor
from lorascope.cli.next import next_study
from lorascope.cli.preflight import preflight
from lorascope.cli.web import web
from lorascope.console import say
from lorascope.errors import EXIT_DONE, EXIT_FAULT, EXIT_INPUT, EXIT_INTERRUPTED, LorascopeError

_STAGES = Group("Stages of a run", sort_key=1)
_PICTURES = Group("Pictures", sort_key=2)
_FILES = Group("Adapter files", sort_key=3)
_MORE = Group("More", sort_key=4)

app = App(
    name="lorascope",
    version=__version__,
    suppress_keyboard_interrupt=False,
    help=(
        "Train Stable Diffusion LoRA candidates under equal conditions and see with evidence which one to "
        "keep."
    ),
    help_epilogue=(
        "Exit codes: 0 done, 1 a fault of ours, 2 usage, configuration or input, 3 the run, an arm or a "
        "picture failed (state kept), 4 inspected and found to do nothing, 130 interrupted (the same "
        "command goes on)."
    ),
)

app.command(stages.study)
app.command(preflight)
for _place, _stage in enumerate(stages.STAGES):
    _command = stages.stage_command(_stage)
    if _stage == "data":
        _data = App(name=_stage, group=_STAGES, sort_key=_place)
        _data.default(_command)
        _data.command(pictures.check)
        app.command(_data)
    else:
        app.command(_command, group=_STAGES, sort_key=_place)
app.command(stages.draw, group=_STAGES, sort_key=len(stages.STAGES))
app.command(pictures.caption, group=_PICTURES)
for _command in (files.export, files.convert, files.inspect, files.extract, files.resize):
    app.command(_command, group=_FILES)
app.command(next_study, name="next", group=_MORE)
for _command in (web, more.bench, doctor, more.presets, more.keys, more.env):
    app.command(_command, group=_MORE)


def _terminate(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # transformers warns at import that torchvision, which is not needed, is missing.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, _terminate)
    debug = os.environ.get("LORASCOPE_DEBUG") == "1"
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return result if isinstance(result, int) else EXIT_DONE
    except CycloptsError as error:
        _say_line(" ".join(str(error).split()))
        return EXIT_INPUT
    except LorascopeError as error:
        if debug:
            traceback.print_exc()
        _say_line(error)
        return error.exit_code
    except KeyboardInterrupt:
        _say_line("interrupted; the same command goes on from here")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_DONE
    except Exception as error:
        if debug:
            traceback.print_exc()
        if _is_interruption(error):
            _say_line("interrupted; the same command goes on from here")
            return EXIT_INTERRUPTED
        if isinstance(error, OSError) and error.filename:  # a place that cannot be used is no fault of ours
            _say_line(
                f"{_cut(error.filename)}: {error.strerror}: check the path, its permissions and the disk"
            )
            return EXIT_INPUT
        if not debug:
            _say_line(f"a fault of ours: {type(error).__name__}: {error} (LORASCOPE_DEBUG=1 shows where)")
        return EXIT_FAULT


def _is_interruption(error: BaseException | None) -> bool:
    """Whether an error came of an interruption: what is met while a library is imported, it passes on as an
    error of its own.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _say_line(message: object) -> None:
    """One line on stderr, whatever the message holds."""
    say("lorascope: " + str(message).replace("\n", "\\n"), file=sys.stderr)


def _cut(name: object) -> str:
    text = os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
    return text if len(text) <= 300 else f"{text[:297]}..."
