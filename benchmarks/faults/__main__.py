"""Plant faults on the pocket base, see what the diagnosis calls them, and learn its thresholds.

Command:  python -m benchmarks.faults --out build/faults
Time:     about 3 h on 2 CPU cores by its own estimate, never run as a whole; `--quick` about 5
          minutes. `--dry-run` says what it would do.
Result:   build/faults/full/matrix.md, matrix.json and causes.png; of `--quick`, without pictures, in
          build/faults/quick.

Each study is a run folder of its own. Interrupted, the same command goes on; what is finished is skipped.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.arms import FILE_ARM, FILE_DONOR, FULL_SEEDS, QUICK_SEEDS, Planned, plan_studies
from benchmarks.faults.files import FILE_FAULTS, check_file_fault, write_findings
from benchmarks.faults.learn import (
    Labelled,
    collect,
    collect_files,
    confusion,
    files_path,
    judge,
    judge_files,
    learn_thresholds,
    learnt,
    split_seeds,
)
from benchmarks.faults.pictures import draw_causes
from benchmarks.faults.scrambled import ScrambledStudy
from benchmarks.faults.table import Result, as_markdown

from lorascope import __version__
from lorascope.console import configure_logging, duration, say
from lorascope.diagnosis.thresholds import Thresholds
from lorascope.errors import LorascopeError
from lorascope.inputs import freeze
from lorascope.machine.device import choose_device
from lorascope.machine.facts import device_facts, now
from lorascope.machine.workers import num_cores
from lorascope.run_folder import RunDir
from lorascope.store import write_json, write_text
from lorascope.study import Study

# A pass of one picture through the pocket U-Net on one core: 5.5 pictures a second of 15 steps with guidance
# on two cores of an AMD EPYC.
_FORWARD_S = 0.012


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.faults",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders and the result")
    parser.add_argument("--quick", action="store_true", help="fewer seeds, arms and pictures")
    parser.add_argument("--seeds", type=int, help=f"training seeds, at least 2 (default {FULL_SEEDS})")
    parser.add_argument("--dry-run", action="store_true", help="print studies, arms and rough time, and stop")
    args = parser.parse_args(arguments)
    num_seeds = args.seeds or (QUICK_SEEDS if args.quick else FULL_SEEDS)
    if num_seeds < 2:
        parser.error(f"--seeds {num_seeds}: must be at least 2: one to learn from, one to judge")
    studies = plan_studies(num_seeds, args.quick)
    if args.dry_run:
        say(describe(studies))
        return 0
    configure_logging(20)
    out = args.out / ("quick" if args.quick else "full")
    try:
        for planned in studies:
            run_study(planned, out)
        result = evaluate(out, studies, args.quick)
    except LorascopeError as error:
        print(f"faults: {error}", file=sys.stderr)
        return error.exit_code
    write_json(out / "matrix.json", result.as_json())
    write_text(out / "matrix.md", as_markdown(result))
    if not args.quick:  # which lacks some of the arms
        draw_causes(out, result.judging_seeds[0], out / "causes.png")
    say(as_markdown(result), out / "matrix.md")
    return 0


def describe(studies: Sequence[Planned]) -> str:
    """Studies, arms and a rough time."""
    lines, total = [], 0.0
    for planned in studies:
        seconds = planned.num_forwards * _FORWARD_S / num_cores()
        total += seconds
        lines.append(f"{planned.name}: {len(planned.faults)} arms, about {duration(seconds)}")
        lines += [
            f"  {fault.name:<22} {fault.label:<20} rank {arm.rank:<3} alpha {arm.alpha:<5g} lr {arm.lr:<8g} "
            f"epochs {arm.epochs}"
            for fault, arm in zip(planned.faults, planned.config.expand_arms(), strict=True)
        ]
    num_seeds = len({planned.seed for planned in studies})
    num_arms = sum(len(planned.faults) for planned in studies)
    lines += [
        f"faults in files of {FILE_ARM}: {', '.join(FILE_FAULTS)}",
        f"{len(studies)} studies, {num_arms} arms, {num_seeds} training seeds: about {duration(total)} on "
        f"{num_cores()} CPU cores (rough)",
    ]
    return "\n".join(lines)


def open_study(planned: Planned, out: Path) -> Study:
    """The study in its run folder."""
    kind = ScrambledStudy if planned.kind == "scrambled" else Study
    return kind(planned.config, out / planned.name)


def run_study(planned: Planned, out: Path) -> None:
    """Train and diagnose the arms of a study, and plant faults into files where it is the main one.

    What is finished is skipped; raises `ConfigError` where the run folder is of another plan.
    """
    run, findings = RunDir(out / planned.name), files_path(out, planned.seed)
    names = {fault.name for fault in planned.faults}
    has_files = {FILE_ARM, FILE_DONOR} <= names
    if run.study_toml.exists():
        freeze(run, planned.config)
    is_done = run.diagnosis_json.exists() and "diagnose" in run.manifest()["stages"]
    if is_done and (findings.exists() or not has_files):
        say(f"{planned.name}: finished")
        return
    study = open_study(planned, out)
    with study.working("python -m benchmarks.faults"):
        study.check_inputs()
        study.prepare_data()
        study.encode()
        study.train()
        study.check_merge()
        study.diagnose()
        if has_files:
            folder = out / f"faulty-{planned.name}"
            found = [
                check_file_fault(study, fault, FILE_ARM, FILE_DONOR, folder / fault) for fault in FILE_FAULTS
            ]
            write_findings(findings, found)


def evaluate(out: Path, studies: Sequence[Planned], quick: bool) -> Result:
    """Learn from one half of the seeds and judge the other."""
    seeds = sorted({planned.seed for planned in studies})
    learning, judging = split_seeds(seeds)
    arms = collect(out, studies)
    files = collect_files(out, seeds)
    lora = [arm for arm in arms if arm.adapter == "lora"]
    cuts = learn_thresholds(arm for arm in lora if arm.seed in learning)
    held_back = [arm for arm in lora if arm.seed in judging]
    own, package = (
        confusion([*judge(held_back, thresholds), *judge_files(files, held_back, thresholds)])
        for thresholds in (learnt(cuts), Thresholds())
    )
    others: dict[str, list[Labelled]] = {}
    for arm in arms:
        if arm.adapter != "lora":
            others.setdefault(arm.adapter, []).append(arm)
    device = device_facts(choose_device("auto"))
    return Result(
        quick=quick,
        learning_seeds=tuple(learning),
        judging_seeds=tuple(judging),
        facts={"lorascope": __version__, "device": device["name"], "date": now()[:10]},
        cuts=cuts,
        matrix=own,
        default_matrix=package,
        other_matrices={kind: confusion(judge(own, learnt(cuts))) for kind, own in others.items()},
        files=files,
    )


if __name__ == "__main__":
    sys.exit(main())
