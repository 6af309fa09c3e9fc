"""The JSON API, for those who script: `/api/openapi.json` describes it.

The token goes with every request as `Authorization: Bearer TOKEN`. An error is `{"error": "one line"}` with a
status of 400 or more.
"""

import math
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Security
from fastapi.responses import FileResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field, ValidationError

from lorascope.config import parse_study
from lorascope.report.evidence import Facts, answer_of
from lorascope.run_folder import RunDir
from lorascope.web.home import delete_run, inside
from lorascope.web.metrics import MAX_POINTS, Points, shortened
from lorascope.web.queue import Job, State, Wish
from lorascope.web.runs import RunCard, RunState
from lorascope.web.services import services_of
from lorascope.web.starting import start_study
from lorascope.web.workspace import OutsideError

_ADAPTER_FILES = (".safetensors", ".json")


class Problem(BaseModel):
    """What every answer with a status of 400 or more holds."""

    error: str = Field(description="what was wrong, what is possible, what to do, in one line")


class JobInfo(BaseModel):
    """A command in the queue."""

    id: int
    kind: str = Field(description="`study`, or what else the app starts")
    title: str
    command: str = Field(description="the command, as it can be given in the working folder")
    run: str = Field(description="name of its run, or empty")
    state: State
    wish: Wish = Field(description="what was asked of it while it runs, and has not happened yet")
    created: float = Field(description="seconds since 1970, as all times here")
    started: float | None
    ended: float | None
    exit_code: int | None
    message: str = Field(description="how it ended, in the command's own words")

    @classmethod
    def of(cls, job: Job) -> "JobInfo":
        """What is told of a job."""
        return cls(**{name: getattr(job, name) for name in cls.model_fields})


class StageInfo(BaseModel):
    """A stage of a run."""

    name: str
    words: str
    seconds: float | None = Field(description="how long it took; null where it has not ended")
    is_under_way: bool


class ProgressInfo(BaseModel):
    """How far the stage under way is."""

    stage: str
    done: int
    total: int
    percent: int
    unit: str = Field(description="what is counted")
    rate: float = Field(description="units a second")
    left_s: float | None = Field(description="seconds left in this stage, where that can be told")
    note: str


class KeepInfo(BaseModel):
    """What the verdict keeps."""

    arm: str
    epoch: str = Field(description="`last`, or `best` by held-out loss")
    strength: float


class RunInfo(BaseModel):
    """A run at a glance."""

    name: str
    state: RunState
    base: str
    source: str = Field(description="where its pictures are from")
    arms: list[str]
    stages: list[StageInfo]
    progress: ProgressInfo | None
    headline: str = Field(description="the verdict in a few words; empty before the diagnosis")
    keep: KeepInfo | None = Field(description="null where nothing is kept, and before the diagnosis")
    failed_arms: dict[str, str] = Field(description="why an arm stopped, by its name")
    message: str = Field(description="why the run stands still, where it does")
    is_elsewhere: bool = Field(description="a process works in it that this queue did not start")
    job: JobInfo | None = Field(description="its newest in the queue")

    @classmethod
    def of(cls, card: RunCard) -> "RunInfo":
        """What is told of a run."""
        progress = card.progress
        return cls(
            name=card.name,
            state=card.state,
            base=card.base,
            source=card.source,
            arms=list(card.arms),
            stages=[StageInfo.model_validate(stage, from_attributes=True) for stage in card.stages],
            progress=progress and ProgressInfo.model_validate(progress, from_attributes=True),
            headline=card.headline,
            keep=_keep(card.keep),
            failed_arms=card.failed_arms,
            message=card.message,
            is_elsewhere=card.is_elsewhere,
            job=card.job and JobInfo.of(card.job),
        )


class CurvesInfo(BaseModel):
    """The curves of an arm, as pairs; a value that is no number is null."""

    step: int = Field(description="the last that is recorded")
    epoch: float
    loss: list[tuple[float, float | None]] = Field(description="step, training loss")
    heldout: list[tuple[float, float | None]] = Field(
        description="epoch, denoising loss on held-out pictures minus the base's: negative is better"
    )


class MetricsInfo(BaseModel):
    """The curves of a run. Where there are more records than points, a point is the mean of a stretch of them
    and stands in its middle; from three points on, the first and the last are those of the records.
    """

    arms: dict[str, CurvesInfo]


class VerdictInfo(BaseModel):
    """The answer of a run, as its report has it."""

    keep: str | None = Field(description="the arm to use; null where the base is better or nothing is told")
    headline: str
    sentences: list[str]
    decision: str | None = Field(description="what the answer rests on; null before the score stage")
    epoch: str | None
    strength: float | None
    tag: str | None = Field(description="what a prompt says to use the arm's file in WebUI")


class NewStudy(BaseModel):
    """A study to run."""

    name: str = Field(
        description="name of the run, which becomes `runs/NAME`",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
    )
    toml: str = Field(description="the text of a study file", max_length=500_000)


class StartedStudy(BaseModel):
    """A study that waits in the queue."""

    run: RunInfo
    job: JobInfo


class Deleted(BaseModel):
    """What deleting a run gave back."""

    freed_bytes: int


_bearer = HTTPBearer(auto_error=False, description="the token in the address that the server printed")
router = APIRouter(
    prefix="/api",
    # The gate has looked at the token by then; this tells it in the description.
    dependencies=[Security(_bearer)],
    responses={"4XX": {"model": Problem, "description": "What was wrong."}},
    generate_unique_id_function=lambda route: route.name,
)


@router.get("/runs", summary="All runs, the last changed first")
def list_runs(request: Request) -> list[RunInfo]:
    """Those that `lorascope study` made in `runs/` on the command line are among them."""
    return [RunInfo.of(card) for card in services_of(request).runs.cards()]


@router.get("/runs/{name}", summary="A run: state, stages, progress, verdict")
def show_run(request: Request, name: str) -> RunInfo:
    """Read anew from the run folder."""
    return RunInfo.of(services_of(request).runs.card(name))


@router.get("/runs/{name}/metrics", summary="The curves of a run")
def show_metrics(
    request: Request,
    name: str,
    points: Annotated[int, Query(ge=1, le=100_000, description="points of a curve, at most")] = MAX_POINTS,
) -> MetricsInfo:
    """Training loss and held-out loss of each arm, as they grow."""
    services = services_of(request)
    services.workspace.run_dir(name)
    curves = dict(services.reader(name).update())
    arms = {
        arm: CurvesInfo(
            step=found.step,
            epoch=found.epoch,
            loss=_pairs(shortened(found.loss, points)),
            heldout=_pairs(shortened(found.heldout, points)),
        )
        for arm, found in curves.items()
    }
    return MetricsInfo(arms=arms)


@router.get("/runs/{name}/verdict", summary="Which arm to keep, at which strength, and why")
def show_verdict(request: Request, name: str) -> VerdictInfo:
    """The answer that the report begins with. Before the score stage it says that there is none yet."""
    services = services_of(request)
    run = RunDir(services.workspace.run_dir(name))
    answer = services.runs.kept("verdict", run.manifest_json, lambda: answer_of(Facts(run)))
    return VerdictInfo.model_validate(answer, from_attributes=True)


@router.get("/runs/{name}/files/{path:path}", summary="A file of an adapter", response_class=FileResponse)
def send_file(request: Request, name: str, path: str) -> Response:
    """`path` is that within the run folder, such as `adapters/r16/pocket-r16.safetensors`. Weights and the
    JSON files beside them are sent, nothing else of a run.
    """
    folder = services_of(request).workspace.run_dir(name)
    suffix = next((suffix for suffix in _ADAPTER_FILES if path.endswith(suffix)), _ADAPTER_FILES[0])
    found = inside(folder, path, suffix)
    if not found.is_file() or not found.is_relative_to(RunDir(folder).adapters_dir.resolve()):
        raise OutsideError(f"{path[:200]}: is no file of an adapter: name one below adapters/")
    return FileResponse(found, media_type="application/octet-stream", filename=found.name)


@router.delete("/runs/{name}", summary="Delete a run folder")
def remove_run(request: Request, name: str) -> Deleted:
    """Refused while the run is in the queue or a process works in its folder."""
    return Deleted(freed_bytes=delete_run(services_of(request), name))


@router.get("/jobs", summary="All commands of the queue, in their order")
def list_jobs(request: Request) -> list[JobInfo]:
    """Those that ended are among them."""
    return [JobInfo.of(job) for job in services_of(request).queue.jobs()]


@router.post("/jobs/{number}/{action}", summary="Pause, resume or cancel a command")
def act_on(request: Request, number: int, action: Literal["pause", "resume", "cancel"]) -> JobInfo:
    """A running command ends after its step, with a checkpoint: ask again to see that it has. `resume` puts
    the same command back into the queue, where it goes on.
    """
    services = services_of(request)
    getattr(services.supervisor, action)(number)
    return JobInfo.of(services.queue.job(number))


@router.post("/studies", summary="Start a study", status_code=201)
def add_study(request: Request, study: NewStudy) -> StartedStudy:
    """Checks the study, freezes it in `runs/NAME/study.toml` and puts it into the queue. 409 where there is
    such a run already, 403 where the study reads a folder that may not be looked into.
    """
    services = services_of(request)
    job = start_study(services, study.name, parse_study(study.toml, study.name))
    return StartedStudy(run=RunInfo.of(services.runs.card(study.name)), job=JobInfo.of(job))


def _keep(keep: dict[str, Any] | None) -> KeepInfo | None:
    try:
        return None if keep is None else KeepInfo.model_validate(keep)
    except ValidationError:  # what is damaged is said by the report, which reads with more care
        return None


def _pairs(points: Points) -> list[tuple[float, float | None]]:
    """JSON has no way to write what a diverged arm's loss becomes."""
    return [(x, y if math.isfinite(y) else None) for x, y in points]
