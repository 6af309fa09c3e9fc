"""How a study begins: what it may read, its run folder with the frozen study file, its place in the queue."""

import os.path
import shutil
from pathlib import Path

from lorascope.errors import LorascopeError
from lorascope.inputs import freeze
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.web.queue import Job
from lorascope.web.services import Services
from lorascope.web.workspace import STUDY_FILE, MissingError, OutsideError, Workspace, require_name


class TakenError(LorascopeError):
    """A name that something else has already."""


def start_study(services: Services, name: str, config: StudyConfig) -> Job:
    """Make the run folder `name` with the study frozen in it, and put the study into the queue.

    Raises `TakenError` where the folder is there already, `OutsideError` where the study reads what a browser
    may not name, `MissingError` where `name` is none, and `StorageError` where nothing can be written.
    """
    workspace = services.workspace
    folder = workspace.runs_dir / require_name(name)
    require_readable(workspace, config)
    workspace.runs_dir.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()  # of two that ask at once, one gets it
    except FileExistsError as error:
        raise TakenError(f"{name}: is a run already: choose another name, or delete that run") from error
    try:
        freeze(RunDir(folder), config.model_copy(update={"name": name}))
        return services.supervisor.enqueue("study", name, study_arguments(name), run=name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def study_arguments(name: str) -> list[str]:
    """The arguments of `lorascope`, in the workspace, that begin a frozen study or go on with it."""
    folder = Path("runs") / name
    return ["study", (folder / STUDY_FILE).as_posix(), "--run-dir", folder.as_posix()]


def require_readable(workspace: Workspace, config: StudyConfig) -> None:
    """Raise `OutsideError` where a study reads a file or folder that may not be looked into.

    Otherwise a study would show what pages do not: captions, or the lines of a text file as prompts. What is
    not there may be a name of the hub's or the package's; the study itself says where it is neither.
    """
    paths = {
        "data.source": config.data.source,
        "sample.prompts": config.sample.prompts,
        "base.model": os.path.expanduser(config.base.model),
        "score.model": os.path.expanduser(config.score.model),
        "score.style_model": os.path.expanduser(config.score.style_model or ""),
    }
    for key, path in paths.items():
        try:
            workspace.resolve(path)
        except MissingError:
            continue
        except OutsideError as error:
            raise OutsideError(f"{key} = {error}") from error
