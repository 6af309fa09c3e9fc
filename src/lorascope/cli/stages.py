"""Stages of a run: `study`, and each stage by itself."""

import gc
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from lorascope import __version__
from lorascope.cli.options import AsJson, Overrides, Preset, Quiet, Run, Verbose, set_level
from lorascope.config import load_study
from lorascope.console import log, say
from lorascope.errors import EXIT_DONE, ConfigError
from lorascope.schema import StudyConfig

if TYPE_CHECKING:
    from lorascope.report.evidence import Answer
    from lorascope.study import Study

StudyFile = Annotated[Path | None, Parameter(help="study file (TOML); none runs the preset")]
RunDirOption = Annotated[Path | None, Parameter(help="run folder; runs/NAME when absent")]
STAGES = {
    "data": "Check pictures and captions, find duplicates, split into train and held-out (data.json).",
    "encode": "Encode pictures and captions once; later runs find them in the cache.",
    "train": "Train all arms (adapters/, metrics.jsonl); an interrupted training goes on.",
    "sample": "Draw the prompts with the base and every arm (images/).",
    "score": "Compare merged with unmerged output and score every picture (scores.parquet).",
    "diagnose": "Find why each arm wins or fails, and its best strength (sweep.parquet, diagnosis.json).",
    "report": "Write report.html, report.md and figures from what the run folder holds.",
}


def study(
    file: StudyFile = None,
    *,
    preset: Preset = None,
    run_dir: RunDirOption = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, Parameter(help="print the plan and stop", negative="")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Run a whole study: data, encode, train, sample, score, diagnose, report. The same command again goes on
    where it stopped.

    For example:

    lorascope study                          the pocket study

    lorascope study --preset smoke           a first try in under a minute

    lorascope study my.toml --set train.epochs=2 --run-dir runs/two-epochs
    """
    set_level(quiet, verbose)
    config = load_study(file, preset, overrides or [])
    if dry_run:
        _print_plan(config, as_json)
        return EXIT_DONE
    job = _new_study(config, run_dir)
    job.run_stages(shlex.join(["lorascope", *sys.argv[1:]]))
    _print_result(job, as_json, quiet)
    job.raise_faults()
    return EXIT_DONE


def stage_command(name: str) -> Callable[..., int]:
    """The command of one stage."""

    def command(
        run: Run,
        *,
        study_file: Annotated[
            Path | None, Parameter(name="--study", help="study file for a run folder that is still empty")
        ] = None,
        preset: Preset = None,
        overrides: Overrides = None,
        as_json: AsJson = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
    ) -> int:
        set_level(quiet, verbose)
        job = _open_study(run, study_file, preset, overrides)
        with job.working(shlex.join(["lorascope", *sys.argv[1:]])):
            match name:
                case "data":
                    job.prepare_data()
                case "score":
                    job.check_merge()
                    job.score()
                case _:
                    done = getattr(job, name)()
        if name == "score":
            _print_scores(job, as_json)
        elif name == "diagnose":
            _print_diagnosis(job, as_json)
        elif name == "report" and as_json:
            say(json.dumps(_result(job, done.verdict)))
        elif name == "report":
            say(job.run_dir.report_html)
        elif name in ("train", "sample"):
            job.raise_faults()
        return EXIT_DONE

    command.__name__ = name
    command.__doc__ = STAGES[name]
    return command


def draw(
    run: Run,
    *,
    prompt: Annotated[str, Parameter(help="what to draw")],
    arm: Annotated[
        list[str] | None, Parameter(help="arm to draw with; may be repeated; all when absent", negative="")
    ] = None,
    strength: Annotated[
        list[float] | None,
        Parameter(help="weight of the adapter, 0 to 2; may be repeated; 1 when absent", negative=""),
    ] = None,
    seed: Annotated[int, Parameter(help="seed of the initial noise", validator=Number(gte=0, lt=2**63))] = 0,
    checkpoint: Annotated[
        Literal["last", "best"], Parameter(help="adapter of the last step, or of the lowest held-out loss")
    ] = "last",
    steps: Annotated[int | None, Parameter(help="denoising steps; those of the study when absent")] = None,
    guidance: Annotated[float | None, Parameter(help="guidance scale; that of the study when absent")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Draw a prompt of your own with the base and trained arms, all from the same noise (tries/).

    For example:

    lorascope draw runs/pocket --prompt "a red fox" --arm r16 --strength 0.6 --strength 1
    """
    set_level(quiet, verbose)
    made = import_study().open(run).draw(prompt, arm, strength or [1.0], seed, checkpoint, steps, guidance)
    folder = run / "tries" / made.folder
    if as_json:
        say(json.dumps({**asdict(made), "folder": str(folder)}))
    else:
        say(folder)
    return EXIT_DONE


def _print_scores(job: "Study", as_json: bool) -> None:
    from lorascope.evaluation.score_text import scores_as_dict, scores_as_markdown
    from lorascope.report.evidence import Facts

    facts = Facts(job.run_dir)
    assert facts.scores is not None
    shown = (facts.scores, facts.verdict, job.config.score.resamples)
    say(json.dumps(scores_as_dict(*shown), indent=2) if as_json else scores_as_markdown(*shown))


def _print_diagnosis(job: "Study", as_json: bool) -> None:
    from lorascope.diagnosis.diagnosis_text import record_as_text
    from lorascope.diagnosis.record import read_diagnosis

    record = read_diagnosis(job.run_dir)
    if as_json:
        say(job.run_dir.diagnosis_json.read_text(encoding="utf-8"))
    else:
        say(record_as_text(record))


def _new_study(config: StudyConfig, run_dir: Path | None) -> "Study":
    log.info(
        "lorascope %s: study %s, arms %s",
        __version__,
        config.name,
        ", ".join(arm.name for arm in config.expand_arms()),
    )
    return import_study()(config, run_dir or Path("runs") / config.name)


def _open_study(
    run: Path, study_file: Path | None, preset: str | None, overrides: list[str] | None
) -> "Study":
    if (run / "study.toml").exists():
        if study_file or preset or overrides:
            raise ConfigError(
                f"{run}: has its study.toml already, so --study, --preset and --set cannot change it: "
                "leave them out or name a new run folder"
            )
        return import_study().open(run)
    if not (study_file or preset):
        raise ConfigError(
            f"{run}: no study.toml here: name a run folder, or give --study FILE or --preset NAME to "
            "start one"
        )
    return _new_study(load_study(study_file, preset, overrides or []), run)


def import_study() -> "type[Study]":
    """Import what a study needs, thousands of modules, without looking for garbage among them: that is a
    seventh of the time.
    """
    gc.disable()
    try:
        from lorascope.study import Study
    finally:
        gc.enable()
    gc.freeze()
    return Study


def _print_plan(config: StudyConfig, as_json: bool) -> None:
    from lorascope.plan import plan_study

    plan = plan_study(config)
    say(json.dumps(asdict(plan), indent=2) if as_json else plan.as_text())


def _print_result(job: "Study", as_json: bool, quiet: bool) -> None:
    from lorascope.report.page import verdict_of

    verdict = verdict_of(job.run_dir)
    if as_json:
        say(json.dumps({"run": str(job.run_dir.path), **_result(job, verdict)}))
    elif quiet:
        say(job.run_dir.report_html)
    else:
        say(f"\n{verdict.answer}\nReport: {job.run_dir.report_html}")


def _result(job: "Study", verdict: "Answer") -> dict[str, Any]:
    """Where the report is and what it answers, for JSON."""
    keys = ("keep", "decision", "epoch", "strength", "tag", "answer")
    return {"report": str(job.run_dir.report_html), **{key: getattr(verdict, key) for key in keys}}
