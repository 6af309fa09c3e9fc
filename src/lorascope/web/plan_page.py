"""The page on which a study is planned: three questions, every key, a live plan, a check, and the start."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse

from lorascope.config import preset_names
from lorascope.data.sources import count_repeats
from lorascope.diagnosis.next_study import propose_after
from lorascope.diagnosis.record import read_diagnosis
from lorascope.errors import ConfigError, LorascopeError
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.sections import DataSection
from lorascope.web import questions
from lorascope.web.drafts import (
    Draft,
    Reason,
    change_draft,
    delete_draft,
    free_name,
    list_drafts,
    new_draft,
    read_draft,
    read_reasons,
    write_toml,
)
from lorascope.web.live import event_stream
from lorascope.web.pages import page, render
from lorascope.web.plans import find_trial, kept_plan, plan_of, preflight_arguments, start_trial
from lorascope.web.queue import in_shell
from lorascope.web.services import Services, services_of
from lorascope.web.starting import TakenError, start_study, study_arguments
from lorascope.web.study_form import (
    Field,
    Part,
    add_table,
    as_text,
    build_form,
    fault_at,
    remove_table,
    set_keys,
)
from lorascope.web.workspace import MissingError, Workspace

router = APIRouter()

_NOTE_KEY = ""  # of the reason that is about the whole study
_MAIN = ("base.model", "data.source", "data.num_train", "train.epochs", "sample.num_prompts")  # and all arms


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form, whatever they are called."""
    return {key: value for key, value in (await request.form()).items() if isinstance(value, str)}


Texts = Annotated[dict[str, str], Depends(_form)]


def _go(request: Request, address: str) -> Response:
    """Lead the browser to another page."""
    if request.headers.get("hx-request"):
        return Response(status_code=200, headers={"hx-redirect": address})
    return RedirectResponse(address, 303)


# -- three questions -----------------------------------------------------------------------------------------


@router.get("/plan")
def ask(request: Request) -> Response:
    """The questions, and what was planned before; `?next=RUN` and `?from=RUN` make a study at once."""
    services, asked = services_of(request), request.query_params
    if run := asked.get("next"):
        record = read_diagnosis(RunDir(services.workspace.run_dir(run)))
        text = propose_after(services.runs.config(run), record).toml
        return _go(request, f"/plan/{new_draft(services.workspace, f'{run[:58]}-next', text).name}")
    if run := asked.get("from"):
        text = (services.workspace.run_dir(run) / "study.toml").read_text(encoding="utf-8")
        return _go(request, f"/plan/{new_draft(services.workspace, run, text).name}")
    folder = asked.get("folder", "")
    return page(
        request,
        "plan.html.j2",
        folder=folder,
        count=_count_words(services.workspace, folder) if folder else "",
        folders=_folders(services.workspace),
        goals=questions.GOALS,
        sd15=questions.SD15,
        presets=preset_names(),
        drafts=list_drafts(services.workspace),
    )


def _folders(workspace: Workspace) -> list[str]:
    """What may be chosen at once: sets of pictures in the workspace, and the package's."""
    found = sorted(path.name for path in workspace.pictures_dir.glob("[!.]*") if path.is_dir())
    return [*(f"pictures/{name}" for name in found), questions.POCKET]


@router.get("/plan/-/count")
def count(request: Request, folder: str = "") -> Response:
    """How many pictures a folder holds, as words."""
    return HTMLResponse(
        render("_plan_count.html.j2", words=_count_words(services_of(request).workspace, folder))
    )


def _count_words(workspace: Workspace, folder: str) -> str:
    if not folder.strip():
        return ""
    try:
        source, counted, shown = _count(workspace, folder)
    except LorascopeError as error:
        return str(error)
    if source == questions.POCKET:
        return "1,500 drawings of the pocket world, with captions, come with lorascope."
    if counted is None:
        return "How many pictures this holds is known once it is read."
    times = f", {shown:,} an epoch by the numbers in their folders' names" if shown != counted else ""
    return f"{counted:,} pictures{times}."


def _count(workspace: Workspace, folder: str) -> tuple[str, int | None, int | None]:
    """`data.source` for what was named, its pictures, and how many an epoch shows of them."""
    folder = folder.strip()
    if folder == questions.POCKET:
        return folder, None, None
    if not folder:
        raise ConfigError(
            "what do you have: name a folder of pictures, or `pocket` for those that come along"
        )
    try:
        path = workspace.resolve(folder)
    except MissingError:
        if re.fullmatch(r"[\w.-]+/[\w.-]+", folder) and not (workspace.folder / folder).parent.is_dir():
            return folder, None, None  # a data set of the hub
        raise
    if not path.is_dir():
        return workspace.shown_path(path), None, None
    repeats, _ = count_repeats(DataSection(source=str(path)))
    counted = sum(repeats.values())
    shown = sum(times * number for times, number in repeats.items())
    return workspace.shown_path(path), counted or None, shown or None


@router.post("/plan")
def answer(
    request: Request,
    folder: Annotated[str, Form()] = "",
    base: Annotated[str, Form()] = questions.POCKET,
    own_base: Annotated[str, Form()] = "",
    goal: Annotated[str, Form()] = "style",
    time: Annotated[float, Form()] = 1.0,
    unit: Annotated[str, Form()] = "hours",
    word: Annotated[str, Form()] = "",
    name: Annotated[str, Form()] = "",
    preset: Annotated[str, Form()] = "",
) -> Response:
    """Make a study of the answers, or of a preset, and open it."""
    services = services_of(request)
    workspace = services.workspace
    if preset:
        text = f"preset = {preset!r}\n".replace("'", '"')
        return _go(request, f"/plan/{new_draft(workspace, _name_of(name or preset), text).name}")
    source, counted, shown = _count(workspace, folder)
    if base == "own":
        base = _base(workspace, own_base)
    wanted = _name_of(name or Path(source).name)
    given = questions.answer(
        free_name(wanted, lambda known: (workspace.studies_dir / f"{known}.toml").exists()),
        source,
        counted,
        base,
        goal,
        time * (60 if unit == "hours" else 1),
        word,
        shown,
    )
    proposal, _ = questions.fit(given, lambda config: plan_of(services, config))
    reasons = {choice.key: choice.reason for choice in proposal.choices}
    kept = [Reason(choice.key, choice.value, choice.reason) for choice in proposal.choices]
    text = write_toml(proposal.table, reasons)
    draft = new_draft(workspace, given.name, text, (Reason(_NOTE_KEY, None, proposal.note), *kept))
    return _go(request, f"/plan/{draft.name}")


def _base(workspace: Workspace, text: str) -> str:
    """`base.model` for what was named: a path where it is one, else an id of the hub's."""
    if not text.strip():
        raise ConfigError("base: name a folder, a checkpoint file, or an id of the hub such as owner/name")
    try:
        return workspace.shown_path(workspace.resolve(text.strip()))
    except MissingError:
        return text.strip()


def _name_of(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:58] or "study"


# -- a draft -------------------------------------------------------------------------------------------------


@router.get("/plan/{name}")
def draft_page(request: Request, name: str) -> Response:
    """A draft with its reasons, its form, its plan and its check."""
    services = services_of(request)
    draft = read_draft(services.workspace, name)
    config, fault = _read(draft)
    return page(
        request,
        "plan_draft.html.j2",
        draft=draft,
        fault=fault,
        note=_note(services.workspace, name),
        reasons=_reasons(services.workspace, draft, config),
        parts=_parts(draft, config),
        live=_live(services, draft, config, is_kept_only=True),
        check=_check(request, services, draft),
        run=_free_run(services, name),
        in_shell=in_shell,
        arguments=study_arguments,
    )


def _read(draft: Draft) -> tuple[StudyConfig | None, tuple[str, str] | None]:
    """The study, or the key that is wrong and what is wrong there."""
    try:
        return draft.config, None
    except ConfigError as error:
        return None, fault_at(str(error), (draft.argument, "study"))


def _parts(draft: Draft, config: StudyConfig | None) -> list[Part]:
    """The form; none where the text is no TOML."""
    try:
        return build_form(draft.table, config)
    except ConfigError:
        return []


def _note(workspace: Workspace, name: str) -> str:
    return next((item.reason for item in read_reasons(workspace, name) if item.key == _NOTE_KEY), "")


def _reasons(workspace: Workspace, draft: Draft, config: StudyConfig | None) -> list[dict[str, Any]]:
    """Why values were chosen, with what they are now."""
    values = config.model_dump(mode="json") if config is not None else {}
    shown = []
    for item in read_reasons(workspace, draft.name):
        if item.key in (_NOTE_KEY, "name"):
            continue
        now, was = as_text(_at(values, item.key)) if values else as_text(item.value), as_text(item.value)
        is_main = item.key in _MAIN or item.key.startswith("arms.")
        now = (now or "none") if now != was else ""
        shown.append({"key": item.key, "value": was, "now": now, "reason": item.reason, "is_main": is_main})
    return shown


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(values, list):
            values = values[int(part)] if part.isdigit() and int(part) < len(values) else None
        else:
            values = values.get(part) if isinstance(values, dict) else None
    return values


@router.post("/plan/{name}/keys")
def save_keys(request: Request, name: str, texts: Texts) -> Response:
    """Lay fields of the form over the draft, and save it whether it is right or not."""
    services = services_of(request)
    sent = {key: text for key, text in texts.items() if key not in ("csrf", "add", "remove")}

    def change(draft: Draft) -> str:
        table, config = draft.table, _read(draft)[0]
        set_keys(table, sent, config)
        if "add" in texts:
            add_table(table, texts["add"], config)
        elif "remove" in texts:
            key, _, number = texts["remove"].rpartition(".")
            remove_table(table, key, int(number) if number.isdigit() else -1, config)
        return write_toml(table, _standing(services.workspace, draft, table))

    before = _fields(read_draft(services.workspace, name))
    draft = change_draft(services.workspace, name, change)
    if not request.headers.get("hx-request"):
        place = f"#part-{next(iter(sent), 'name').partition('.')[0]}" if sent else ""
        return RedirectResponse(f"/plan/{name}{place}", 303)
    config, fault = _read(draft)
    after = {
        field.key: field for part in _parts(draft, config) for table in part.tables for field in table.fields
    }
    moved = [field for key, field in after.items() if key not in sent and before.get(key) != field.value]
    return _saved(draft, fault, list(after.values()), moved)


def _fields(draft: Draft) -> dict[str, str]:
    parts = _parts(draft, _read(draft)[0])
    return {field.key: field.value for part in parts for table in part.tables for field in table.fields}


def _standing(workspace: Workspace, draft: Draft, table: Mapping[str, Any]) -> dict[str, str]:
    """The reasons of values that are still as they were chosen."""
    return {
        item.key: item.reason
        for item in read_reasons(workspace, draft.name)
        if item.key and _at(table, item.key) == item.value
    }


@router.post("/plan/{name}/text")
def save_text(
    request: Request, name: str, text: Annotated[str, Form()] = "", version: Annotated[str, Form()] = ""
) -> Response:
    """Save the whole file as it was typed, right or wrong."""
    services = services_of(request)
    draft = change_draft(services.workspace, name, lambda _: text, version)
    if not request.headers.get("hx-request"):
        return RedirectResponse(f"/plan/{name}#part-text", 303)
    config, fault = _read(draft)
    form = render(
        "_plan_form.html.j2",
        draft=draft,
        parts=_parts(draft, config),
        fault=fault,
        swapped=True,
        csrf=_csrf(request),
    )
    return _saved(draft, fault, [], [], extra=form, is_text=True)


def _csrf(request: Request) -> str:
    return str(request.app.state.access.csrf)


def _saved(
    draft: Draft,
    fault: tuple[str, str] | None,
    fields: list[Field],
    moved: list[Field],
    extra: str = "",
    is_text: bool = False,
) -> Response:
    """What a page changes once a draft was saved: what is wrong and where, and the other view of the file."""
    content = render(
        "_plan_saved.html.j2", draft=draft, fault=fault, fields=fields, moved=moved, is_text=is_text
    )
    return HTMLResponse(content + extra, headers={"hx-trigger": "draft-changed"})


@router.post("/plan/{name}/delete")
def delete(request: Request, name: str) -> Response:
    """Remove the draft; runs that were started from it stay."""
    delete_draft(services_of(request).workspace, name)
    return _go(request, "/plan")


# -- the live plan, the check, the start ---------------------------------------------------------------------


@router.get("/plan/{name}/live")
def live(request: Request, name: str) -> Response:
    """What the study would take: seconds to compute where it is not known yet."""
    services = services_of(request)
    draft = read_draft(services.workspace, name)
    content = _live(services, draft, _read(draft)[0])
    if request.headers.get("hx-request"):
        return HTMLResponse(content)
    return RedirectResponse(f"/plan/{name}#plan", 303)


def _live(services: Services, draft: Draft, config: StudyConfig | None, is_kept_only: bool = False) -> str:
    plan, problem = None, ""
    if config is None:
        problem = "The study file is not right yet: what is wrong stands at its key."
    else:
        plan = kept_plan(services, config)
        if plan is None and not is_kept_only:
            try:
                plan = plan_of(services, config)
            except LorascopeError as error:
                problem = str(error)
    return render(
        "_plan_live.html.j2",
        draft=draft,
        plan=plan,
        problem=problem,
        free_disk=shutil.disk_usage(services.workspace.folder).free,
    )


@router.post("/plan/{name}/preflight")
def check(request: Request, name: str) -> Response:
    """Have the draft checked by doing a little of all of it."""
    services = services_of(request)
    draft = read_draft(services.workspace, name)
    start_trial(services, draft)
    if request.headers.get("hx-request"):
        return HTMLResponse(_check(request, services, draft))
    return RedirectResponse(f"/plan/{name}#check", 303)


@router.get("/plan/{name}/events")
async def events(request: Request, name: str) -> StreamingResponse:
    """The check as it goes on."""
    services = services_of(request)
    read_draft(services.workspace, name)

    def make() -> dict[str, str]:
        return {"check": _check(request, services, read_draft(services.workspace, name))}

    return event_stream(request, services.workspace.state_dir, make)


def _check(request: Request, services: Services, draft: Draft) -> str:
    config, _ = _read(draft)
    trial = find_trial(services, draft)
    return render(
        "_plan_check.html.j2",
        draft=draft,
        trial=trial,
        is_current=trial is not None and trial.is_of(config),
        waits=services.queue.jobs("running") if trial is not None and trial.job.state == "queued" else [],
        command=in_shell(preflight_arguments(draft)),
        csrf=_csrf(request),
    )


def _free_run(services: Services, wanted: str) -> str:
    return free_name(wanted, lambda known: (services.workspace.runs_dir / known).exists())


@router.post("/plan/{name}/start")
def start(
    request: Request, name: str, run: Annotated[str, Form()] = "", sure: Annotated[str, Form()] = ""
) -> Response:
    """Freeze the study in a run folder, put it into the queue, and show the run."""
    services = services_of(request)
    draft = read_draft(services.workspace, name)
    config = draft.config
    run = run.strip() or _free_run(services, name)
    trial = find_trial(services, draft)
    ask: dict[str, Any] = {"draft": draft, "run": run, "command": in_shell(study_arguments(run))}
    if not sure and not (trial is not None and trial.has_passed(config)):
        failed = trial is not None and trial.is_of(config)
        return page(request, "plan_start.html.j2", taken="", failed=failed, trial=trial, **ask)
    try:
        start_study(services, run, config)
    except TakenError as error:
        ask |= {"run": _free_run(services, run), "taken": str(error), "failed": False, "trial": None}
        ask["command"] = in_shell(study_arguments(ask["run"]))
        return page(request, "plan_start.html.j2", status=409, **ask)
    return _go(request, f"/runs/{run}")
