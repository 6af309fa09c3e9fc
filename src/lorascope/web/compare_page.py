"""The page to compare on: prompts by arms, strengths or epochs, blind votes, and prompts of one's own."""

import datetime
import secrets
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field

from lorascope.errors import ConfigError
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.sweep_rows import Epoch
from lorascope.evaluation.tries import MAX_STRENGTH, checked_prompt, plan_pictures, read_tries
from lorascope.run_folder import RunDir
from lorascope.store import digest_json
from lorascope.web.compare import WAYS, Choice, Grid, Pictures
from lorascope.web.home import inside
from lorascope.web.pages import page, render
from lorascope.web.queue import Job
from lorascope.web.runs import RunCard
from lorascope.web.services import Services, services_of
from lorascope.web.thumbnails import thumbnail
from lorascope.web.votes import Pair, Session, cast, next_place, plan_session, read_votes, results
from lorascope.web.workspace import MissingError

router = APIRouter()

MAX_TRIES = 20  # that the page shows
_MAX_STRENGTHS = 8
_NUM_PAIRS = (10, 25, 50)


@router.get("/runs/{name}/compare")
def compare(
    request: Request,
    name: str,
    by: str = "arms",
    arm: str = "",
    seed: int | None = None,
    epoch: int | None = None,
    column: Annotated[list[str] | None, Query()] = None,
) -> Response:
    """Everything on one page."""
    services = services_of(request)
    pictures = Pictures(services.runs, name)
    grid = pictures.grid(Choice(by, arm, seed, epoch, tuple(column or ())))
    votes, num_damaged = read_votes(pictures.run.votes_jsonl)
    card = services.runs.card(name)
    is_trained = any(stage.name == "train" and stage.seconds is not None for stage in card.stages)
    return page(
        request,
        "compare.html.j2",
        name=name,
        grid=grid,
        ways=WAYS,
        faults=pictures.faults,
        votes=results(votes, pictures.scores),
        num_damaged=num_damaged,
        num_pairs=[number for number in _NUM_PAIRS if number < len(grid.rows)] + [len(grid.rows)],
        is_trained=is_trained,
        arms=[arm for arm in pictures.arms if is_trained and arm not in card.failed_arms],
        kept=_kept(card, grid),
        tries=_tries(request, services, name)[0],
        max_strength=MAX_STRENGTH,
    )


def _kept(card: RunCard, grid: Grid) -> str:
    """The column that a vote is most likely about: that of the kept arm, else the first."""
    keys = [column.key for column in grid.all_columns if column.key != BASE]
    return next((key for key in keys if key in card.headline.split()), keys[0] if keys else "")


# -- blind votes ---------------------------------------------------------------------------------------------


class Asked(BaseModel):
    """A session of votes as its address names it, and what is asked about it: the same names give the same
    pairs in the same order.
    """

    by: str
    arm: str = ""
    noise: int = 0
    epoch: int = 0
    a: str
    b: str
    count: int = Field(10, ge=1, le=10_000)
    seed: int = 0
    stop: bool = False
    index: int = 0
    side: str = "left"
    answer: str = ""

    @property
    def query(self) -> dict[str, Any]:
        """What names the session."""
        return self.model_dump(include={"by", "arm", "noise", "epoch", "a", "b", "count", "seed"})


class _Voting:
    """A session of votes on the pictures of a run."""

    def __init__(self, services: Services, name: str, asked: Asked) -> None:
        self.pictures = Pictures(services.runs, name)
        self.file = self.pictures.run.votes_jsonl
        grid = self.pictures.grid(Choice(asked.by, asked.arm, asked.noise, asked.epoch))
        self.session: Session = plan_session(_pairs(grid, asked.a, asked.b), asked.seed, asked.count)
        self.address = f"/runs/{name}/compare/vote?{urlencode(asked.query)}"
        back = {"by": asked.by, "arm": asked.arm, "seed": asked.noise, "epoch": asked.epoch}
        self.back = f"/runs/{name}/compare?{urlencode(back)}"


def _pairs(grid: Grid, a: str, b: str) -> list[Pair]:
    one, other = grid.column(a), grid.column(b)
    if one is None or other is None:
        raise MissingError(f"{(b if one else a)[:60]!r}: no such column: choose two on the page again")
    return [
        Pair(row.key, row.prompt, one.full, other.full, row.cells[a].path, row.cells[b].path)
        for row in grid.rows
        if a in row.cells and b in row.cells
    ]


@router.post("/runs/{name}/compare/vote/begin")
def begin_vote(request: Request, name: str, asked: Annotated[Asked, Form()]) -> Response:
    """Draw a seed for order and sides, and go to the first pair."""
    asked = asked.model_copy(update={"seed": secrets.randbits(32)})
    return RedirectResponse(_Voting(services_of(request), name, asked).address, 303)


@router.get("/runs/{name}/compare/vote")
def vote(request: Request, name: str, asked: Annotated[Asked, Query()]) -> Response:
    """The next pair of a session, or what its votes come to."""
    voting = _Voting(services_of(request), name, asked)
    own = [vote for vote in read_votes(voting.file)[0] if vote.session == voting.session.id]
    index = None if asked.stop else next_place(voting.session, own)
    return page(
        request,
        "vote.html.j2",
        name=name,
        query=asked.query,
        address=voting.address,
        back=voting.back,
        index=index,
        pair=None if index is None else voting.session.pairs[index],
        total=len(voting.session.pairs),
        results=results(own, voting.pictures.scores) if index is None else [],
        votes=own,
    )


@router.get("/runs/{name}/compare/vote/picture")
def vote_picture(request: Request, name: str, asked: Annotated[Asked, Query()]) -> Response:
    """A picture of a pair by its side: an address that does not say what drew it."""
    services = services_of(request)
    voting = _Voting(services, name, asked)
    if not 0 <= asked.index < len(voting.session.pairs):
        raise MissingError(f"pair {asked.index + 1}: is not in this vote")
    pair = voting.session.pairs[asked.index]
    path = pair.left_picture if asked.side == "left" else pair.right_picture
    found = inside(voting.pictures.run.path, path, ".png")
    content = thumbnail(found, 1024, services.workspace.state_dir / "thumbnails")
    return Response(content, media_type="image/webp", headers={"cache-control": "private, max-age=60"})


@router.post("/runs/{name}/compare/vote")
def answer(request: Request, name: str, asked: Annotated[Asked, Form()]) -> Response:
    """Keep an answer, and go on to the next pair."""
    voting = _Voting(services_of(request), name, asked)
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    cast(voting.file, voting.session, asked.index, asked.answer, time)
    return RedirectResponse(voting.address, 303)


# -- prompts of one's own ------------------------------------------------------------------------------------


@router.post("/runs/{name}/compare/try")
def try_prompt(
    request: Request,
    name: str,
    prompt: Annotated[str, Form()],
    strengths: Annotated[str, Form()] = "1",
    seed: Annotated[int, Form(ge=0, lt=2**63)] = 0,
    checkpoint: Annotated[str, Form()] = "last",
    arm: Annotated[list[str] | None, Form()] = None,
) -> Response:
    """Put `lorascope draw` into the queue, before what waits there."""
    services = services_of(request)
    run = RunDir(services.workspace.run_dir(name))
    if "train" not in run.manifest()["stages"]:
        raise ConfigError(f"{name}: no training has ended here: a prompt can be tried once it has")
    known = {found.name for found in services.runs.config(name).expand_arms()}
    chosen = list(dict.fromkeys(arm or ()))
    if not chosen:
        raise ConfigError("no arm was chosen: tick at least one to see it beside the base")
    if strangers := [one for one in chosen if one not in known]:
        raise MissingError(f"{strangers[0][:60]!r}: is no arm of {name}")
    epoch: Epoch = "best" if checkpoint == "best" else "last"
    values = strengths_of(strengths)
    plan_pictures(chosen, epoch, values)
    arguments = ["draw", f"runs/{name}", f"--prompt={checked_prompt(prompt)}", f"--seed={seed}"]
    arguments += [f"--arm={one}" for one in chosen]
    arguments += [f"--strength={value:g}" for value in values]
    arguments += ["--checkpoint=best"] if epoch == "best" else []
    services.supervisor.enqueue("draw", f"{name}: a prompt of your own", arguments, run=name, first=True)
    if request.headers.get("hx-request"):
        return Response(_tries(request, services, name)[0], media_type="text/html")
    return RedirectResponse(f"/runs/{name}/compare#try", 303)


def strengths_of(text: str) -> list[float]:
    """Numbers with spaces or commas between them; raise `ConfigError` for others, none or too many."""
    words = text.replace(",", " ").split()
    if not 1 <= len(words) <= _MAX_STRENGTHS:
        raise ConfigError(f"strengths {text[:60]!r}: give 1 to {_MAX_STRENGTHS} numbers, such as 0.6 1")
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ConfigError(f"strengths {text[:60]!r}: are no numbers: give such as 0.6 1") from error


@router.get("/runs/{name}/compare/tries")
def tries(request: Request, name: str, seen: str = "") -> Response:
    """The tries, where they are others than were seen."""
    services = services_of(request)
    text, stamp = _tries(request, services, name)
    return Response(status_code=204) if seen == stamp else Response(text, media_type="text/html")


def _tries(request: Request, services: Services, name: str) -> tuple[str, str]:
    """The fragment of all tries, and a stamp that changes with it."""
    run = RunDir(services.workspace.run_dir(name))
    found, faults = read_tries(run)
    jobs = [job for job in services.queue.recent("draw") if job.run == name]
    shown = [
        job for place, job in enumerate(jobs) if job.state in ("queued", "running") or _is_fault(place, job)
    ]
    waits = [job for job in services.queue.jobs("running") if job.run != name or job.kind != "draw"]
    stamp = digest_json(
        [
            [[job.id, job.state, job.wish, job.message] for job in shown],
            [[item.folder, item.made, len(item.pictures)] for item in found],
            [job.id for job in waits],
            faults,
        ]
    )[:12]
    text = render(
        "_tries.html.j2",
        name=name,
        csrf=request.app.state.access.csrf,
        stamp=stamp,
        jobs=[(job, job.command) for job in shown],
        waits=waits,
        tries=found[:MAX_TRIES],
        num_more=max(0, len(found) - MAX_TRIES),
        faults=faults,
        folder=str(run.tries_dir),
    )
    return text, stamp


def _is_fault(place: int, job: Job) -> bool:
    """Whether the newest job ended without pictures."""
    return place == 0 and job.state in ("failed", "paused")
