"""The command line. Results go to stdout, progress and logs to stderr; heavy imports happen inside the
commands.
"""

import gc
import json
import logging
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.validators import Number

from lorascope import __version__
from lorascope.config import StudyConfig, load_study, preset_names, preset_text, reference_table
from lorascope.console import configure_logging, log, size
from lorascope.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_GATE_REJECTED,
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    EXIT_RUN_FAILED,
    ConfigError,
    LorascopeError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorascope.adapters.files import Written
    from lorascope.adapters.lowrank import Cut
    from lorascope.study import Study

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
    help_epilogue="Exit codes: 0 done, 1 a fault of ours, 2 usage, configuration or input, 3 the run, an "
    "arm or a "
    "picture failed "
    "(state kept), 4 inspected and found to do nothing, 130 interrupted (the same command goes on).",
)

StudyFile = Annotated[Path | None, Parameter(help="study file (TOML); none runs the preset")]
Preset = Annotated[str | None, Parameter(help=f"preset to start from: {', '.join(preset_names())}")]
RunDirOption = Annotated[Path | None, Parameter(help="run folder; runs/NAME when absent")]
Overrides = Annotated[
    list[str] | None,
    Parameter(
        name=["--set", "-s"], help="key=value, for example --set train.epochs=2; may be repeated", negative=""
    ),
]
Run = Annotated[Path, Parameter(help="run folder, such as runs/pocket")]
FormatOption = Annotated[
    Literal["kohya", "peft", "diffusers", "merged-diffusers", "merged-ldm"],
    Parameter(
        name="--format", help="kohya is for WebUI, Forge and ComfyUI; the merged ones are whole models"
    ),
]
DtypeOption = Annotated[
    Literal["fp16", "bf16", "fp32"] | None,
    Parameter(help="dtype of the weights; fp32 for peft and fp16 for the others when absent"),
]
AdapterFormatOption = Annotated[
    Literal["kohya", "peft", "diffusers"],
    Parameter(name="--format", help="kohya is for WebUI, Forge and ComfyUI"),
]
RankOption = Annotated[int | None, Parameter(help="rank of every module, or with --energy the highest")]
EnergyOption = Annotated[
    float | None, Parameter(help="share of each update's squared norm to keep, such as 0.95")
]
AdapterName = Annotated[str | None, Parameter(help="name that programs show, the alias in WebUI's prompts")]
Force = Annotated[bool, Parameter(help="replace what is there", negative="")]
AsJson = Annotated[bool, Parameter(name="--json", help="print the result as JSON", negative="")]
Quiet = Annotated[bool, Parameter(name=["--quiet", "-q"], help="print the result's path only", negative="")]
Verbose = Annotated[bool, Parameter(name=["--verbose", "-v"], help="log details", negative="")]


@app.command
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
    """Run a whole study: data, encode, train, sample, score, report. The same command again goes on where it
    stopped.

    For example:

    lorascope study                          the pocket study

    lorascope study --preset smoke           a first try in under a minute

    lorascope study my.toml --set train.epochs=2 --run-dir runs/two-epochs
    """
    _set_level(quiet, verbose)
    config = load_study(file, preset, overrides or [])
    if dry_run:
        _print_plan(config, as_json)
        return EXIT_DONE
    job = _new_study(config, run_dir)
    job.run_stages(shlex.join(["lorascope", *sys.argv[1:]]))
    _print_result(job, as_json, quiet)
    job.raise_faults()
    return EXIT_DONE


data_app = App(name="data", group=_STAGES, sort_key=0)
app.command(data_app)


_STAGE_NAMES = ("data", "encode", "train", "sample", "score", "report")


def _stage(name: str) -> Any:
    """Make the command of one stage."""
    text = {
        "data": "Check pictures and captions, find duplicates, split into train and held-out (data.json).",
        "encode": "Encode pictures and captions once; later runs find them in the cache.",
        "train": "Train all arms (adapters/, metrics.jsonl); an interrupted training goes on.",
        "sample": "Draw the prompts with the base and every arm (images/).",
        "score": "Compare merged with unmerged output and score every picture (scores.parquet).",
        "report": "Write report.html, report.md and figures from what the run folder holds.",
    }[name]

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
        _set_level(quiet, verbose)
        job = _open_study(run, study_file, preset, overrides)
        with job.working(shlex.join(["lorascope", *sys.argv[1:]])):
            match name:
                case "data":
                    job.prepare_data()
                case "score":
                    job.check_merge()
                    job.score()
                case _:
                    getattr(job, name)()
        if name == "score":
            from lorascope.evaluation.score_text import scores_as_dict, scores_as_markdown
            from lorascope.evaluation.scores import read_scores

            scores = read_scores(job.run_dir)
            print(json.dumps(scores_as_dict(scores), indent=2) if as_json else scores_as_markdown(scores))
        elif name == "report":
            print(
                json.dumps({"report": str(job.run_dir.report_html)}) if as_json else job.run_dir.report_html
            )
        elif name in ("train", "sample"):
            job.raise_faults()
        return EXIT_DONE

    command.__name__ = name
    command.__doc__ = text
    return (
        data_app.default(command)
        if name == "data"
        else app.command(command, group=_STAGES, sort_key=_STAGE_NAMES.index(name))
    )


for _name in _STAGE_NAMES:
    _stage(_name)


@data_app.command
def check(
    source: Annotated[
        str, Parameter(help="what data.source takes: a folder, Parquet, tar files, or a hub data set id")
    ],
    *,
    resolution: Annotated[int, Parameter(help="side of the square in training, in pixels")] = 512,
    buckets: Annotated[bool, Parameter(help="plan aspect-ratio buckets", negative="")] = False,
    base: Annotated[
        str, Parameter(help="base whose tokenizer counts the captions' tokens; nothing else of it is loaded")
    ] = "pocket",
    overrides: Overrides = None,
    out: Annotated[Path | None, Parameter(help="folder for contact-sheet.png and duplicates.png")] = None,
    as_json: AsJson = False,
    quiet: Annotated[
        bool, Parameter(name=["--quiet", "-q"], help="print nothing but faults", negative="")
    ] = False,
) -> int:
    """Look at pictures and captions before a run: sizes, caption lengths, refusals, duplicates, a contact
    sheet.

    Exit code 0: a run would start; 2: it would not, and the last lines say why.

    Examples:

    lorascope data check my-pictures --resolution 512 --buckets --out look

    lorascope data check 'shards-{000..099}.tar' --base stable-diffusion-v1-5/stable-diffusion-v1-5
    """
    _set_level(quiet, False)
    settings = [
        f"data.source={json.dumps(source, ensure_ascii=False)}",
        f"data.resolution_px={resolution}",
        f"data.buckets={json.dumps(buckets)}",
    ]
    config = load_study(
        preset="pocket",
        overrides=[
            *settings,
            f"base.model={json.dumps(base, ensure_ascii=False)}",
            "data.num_train=",
            *(overrides or []),
        ],
    )

    from lorascope.base.loading import load_tokenizer
    from lorascope.console import track
    from lorascope.data.check import check_data
    from lorascope.data.dataset import check_source

    tokenizer = load_tokenizer(config.base)
    with track("check", 1, "pictures") as task:

        def show(done: int, total: int) -> None:
            task.set_total(total)
            task.advance(done - task.completed)

        checked = check_source(
            config.data, lambda caption: len(tokenizer(caption).input_ids), tokenizer.model_max_length, show
        )
    result = check_data(checked, tokenizer.model_max_length)
    sheets = result.draw(out) if out else []
    if as_json:
        print(json.dumps({**result.as_dict(), "sheets": [str(path) for path in sheets]}, indent=2))
    elif not quiet:
        print(result.as_text(), *(f"Drawn: {path}" for path in sheets), sep="\n")
    return EXIT_DONE if result.dataset else EXIT_INPUT


@app.command(group=_FILES)
def export(
    run: Run,
    *,
    arm: Annotated[str, Parameter(help="arm to export, such as r16")],
    layout: FormatOption = "kohya",
    out: Annotated[
        Path | None,
        Parameter(help="file or folder to write; study and arm, in the current folder, when absent"),
    ] = None,
    dtype: DtypeOption = None,
    name: AdapterName = None,
    checkpoint: Annotated[
        Literal["best", "last"], Parameter(help="adapter of the lowest held-out loss, or of the last step")
    ] = "last",
    force: Force = False,
) -> int:
    """Write a trained arm as a file for other programs, or the base with the arm merged in.

    For example:

    lorascope export runs/paper --arm r16                              for WebUI, Forge and ComfyUI

    lorascope export runs/paper --arm r16 --format diffusers           one file for load_lora_weights

    lorascope export runs/paper --arm r16 --format merged-ldm          one checkpoint file, nothing else
    needed
    """
    _set_level(False, False)
    if not (run / "study.toml").is_file():
        raise ConfigError(f"{run}: no study.toml here: name a run folder")
    from lorascope.adapters.export import export_arm
    from lorascope.store import RunDir

    config = load_study(run / "study.toml", environment={})
    _print_written(export_arm(RunDir(run), config, arm, layout, out, dtype, name, checkpoint, force))
    return EXIT_DONE


@app.command(group=_FILES)
def convert(
    source: Annotated[Path, Parameter(help="adapter file or PEFT folder, of any program")],
    out: Annotated[Path, Parameter(help="file or folder to write")],
    *,
    layout: FormatOption = "kohya",
    dtype: DtypeOption = None,
    name: AdapterName = None,
    base: Annotated[
        str | None, Parameter(help="model to merge into, as base.model: for the merged formats")
    ] = None,
    force: Force = False,
) -> int:
    """Write an adapter of another program in another format.

    For example:

    lorascope convert pytorch_lora_weights.safetensors style.safetensors          diffusers' file for WebUI

    lorascope convert style.safetensors style-peft --format peft                  a PEFT folder to train on

    lorascope convert style.safetensors merged --format merged-diffusers --base
    stable-diffusion-v1-5/stable-diffusion-v1-5
    """
    _set_level(False, False)
    from lorascope.adapters.export import convert as convert_adapter

    _print_written(convert_adapter(source, out, layout, dtype, name, base, force))
    return EXIT_DONE


@app.command(group=_PICTURES)
def caption(
    folder: Annotated[Path, Parameter(help="folder with pictures, at any depth")],
    *,
    model: Annotated[
        str, Parameter(help="BLIP captioner: a hub id or a folder")
    ] = "Salesforce/blip-image-captioning-base",
    revision: Annotated[str | None, Parameter(help="branch, tag or commit of a hub id")] = None,
    out: Annotated[
        Literal["sidecar", "jsonl"], Parameter(help="1.txt beside 1.png, or metadata.jsonl")
    ] = "sidecar",
    prompt: Annotated[str, Parameter(help='what every caption begins with, such as "a cartoon of"')] = "",
    batch_size: Annotated[int, Parameter(help="pictures at once", validator=Number(gte=1))] = 8,
    max_tokens: Annotated[int, Parameter(help="length of a caption after the prompt, at most")] = 40,
    overwrite: Annotated[
        bool, Parameter(help="caption pictures that have a caption too", negative="")
    ] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="where the model runs")] = "auto",
    as_json: AsJson = False,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], help="no progress", negative="")] = False,
) -> int:
    """Caption pictures with BLIP. Captions that are there are kept; the same command again goes on where it
    stopped.

    Exit code 3 says that some pictures were left without a caption; the result names them.

    Example: lorascope caption my-pictures --prompt "a cartoon of"
    """
    _set_level(quiet, False)
    from lorascope.base.loading import choose_device
    from lorascope.console import track
    from lorascope.data.captioning import caption_folder, load_captioner

    captioner = load_captioner(model, revision, prompt, max_tokens, choose_device(device))
    with track("caption", 0, "pictures") as task:

        def show(done: int, total: int, caption: str) -> None:
            task.set_total(total)
            task.advance(done - task.completed, caption)

        result = caption_folder(
            folder, captioner.caption, out=out, batch_size=batch_size, overwrite=overwrite, progress=show
        )
    print(json.dumps(result.as_dict(), indent=2) if as_json else result.as_text())
    return EXIT_DONE if result.is_complete else EXIT_RUN_FAILED


@app.command(group=_MORE)
def bench(
    *,
    quick: Annotated[
        bool, Parameter(help="fewer arms and steps: under 3 minutes on 2 CPU cores", negative="")
    ] = False,
    base: Annotated[
        str | None,
        Parameter(
            help=(
                "pocket, sd15 (random weights) or a diffusers folder; sd15 on a GPU and pocket on a CPU "
                "when absent"
            )
        ),
    ] = None,
    arms: Annotated[
        str | None, Parameter(help="which to measure, such as P1,P4,O1 or P4-r16; all when absent")
    ] = None,
    blocks: Annotated[
        int | None,
        Parameter(help="blocks that the arms take in turns; 3 when absent", validator=Number(gte=1)),
    ] = None,
    steps: Annotated[
        int | None,
        Parameter(help="steps of a block; 50, or 10 with --quick, when absent", validator=Number(gte=1)),
    ] = None,
    scaling: Annotated[
        bool,
        Parameter(help="also time and memory over adapters, rank and batch size, and a plot", negative=""),
    ] = False,
    again: Annotated[bool, Parameter(help="measure what --out holds once more", negative="")] = False,
    alone: Annotated[
        bool,
        Parameter(
            help=(
                "run the one arm of --arms in this process, without gate and table: for time -v and profilers"
            ),
            negative="",
        ),
    ] = False,
    threads: Annotated[
        int | None, Parameter(help="CPU threads; torch's choice when absent", validator=Number(gte=1))
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="where it runs")] = "auto",
    peers: Annotated[Path, Parameter(help="where benchmarks/fetch_peers.py put kohya's modules")] = Path(
        "benchmarks/peers"
    ),
    out: Annotated[Path, Parameter(help="folder for bench.json and bench.md")] = Path("bench"),
    as_json: AsJson = False,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], help="no progress", negative="")] = False,
) -> int:
    """Time lorascope's training step beside diffusers', PEFT's and kohya's, each checked against a plain
    reference first.

    Arms that --out holds already from this machine are kept: the same command again goes on. Peers need their
    packages: pip install "lorascope[bench]". docs/performance.md says how to read the table.

    For example:

    lorascope bench --quick

    lorascope bench --arms O1 --alone --steps 50

    lorascope bench --base sd15 --scaling --out benchmarks/results/h100
    """
    _set_level(quiet, False)
    import torch

    from lorascope.base.loading import choose_device
    from lorascope.bench.run import Protocol, run_alone, run_bench
    from lorascope.bench.table import as_markdown

    if threads is not None:
        torch.set_num_threads(threads)
    base = base or ("sd15" if choose_device(device).type == "cuda" else "pocket")
    names = [name.strip() for name in arms.split(",")] if arms else []
    protocol = Protocol.quick() if quick else Protocol()
    protocol = Protocol(protocol.num_warm_ups, blocks or protocol.num_blocks, steps or protocol.num_steps)
    if alone:
        if len(names) != 1:
            raise ConfigError(
                f"--alone: takes one arm, --arms names {len(names)}: give for example --arms O1"
            )
        print(json.dumps(run_alone(base, device, names[0], protocol.num_steps, peers), indent=2))
        return EXIT_DONE
    result = run_bench(
        base,
        device,
        quick=quick,
        names=names,
        protocol=protocol,
        scaling=scaling,
        again=again,
        out=out,
        peers_dir=peers,
    )
    print(json.dumps(result, indent=2) if as_json else as_markdown(result), end="" if not as_json else "\n")
    return (
        EXIT_RUN_FAILED if any(row["status"] == "failed" for row in result["entries"].values()) else EXIT_DONE
    )


@app.command(group=_MORE)
def presets(name: Annotated[str | None, Parameter(help="preset to print as TOML")] = None, /) -> int:
    """List the presets, or print one as TOML to copy: lorascope presets recommended > my.toml"""
    if name is not None:
        print(preset_text(name), end="")
        return EXIT_DONE
    for preset in preset_names():
        comment = preset_text(preset).splitlines()[0].removeprefix("# ")
        print(f"{preset:<14} {comment}")
    return EXIT_DONE


@app.command(group=_MORE)
def keys() -> int:
    """Print every key of a study file with type, default and meaning (Markdown)."""
    print(reference_table(), end="")
    return EXIT_DONE


@app.command(group=_MORE)
def env() -> int:
    """Print what a bug report needs: versions, device, threads, caches and variables."""
    import importlib.metadata
    import platform

    facts = {"lorascope": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in (
        "torch",
        "diffusers",
        "transformers",
        "peft",
        "safetensors",
        "pydantic",
        "cyclopts",
        "numpy",
        "pillow",
        "pyarrow",
    ):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    import torch

    from lorascope.data.encoding import default_cache_dir

    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts["threads"] = str(torch.get_num_threads())
    facts["cache"] = str(default_cache_dir())
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        facts[name] = os.environ.get(name, "")
    for key, value in facts.items():
        print(f"{key:<22}{value}")
    return EXIT_DONE


def _new_study(config: StudyConfig, run_dir: Path | None) -> "Study":
    log.info(
        "lorascope %s: study %s, arms %s",
        __version__,
        config.name,
        ", ".join(arm.name for arm in config.expand_arms()),
    )
    return _import_study()(config, run_dir or Path("runs") / config.name)


def _open_study(
    run: Path, study_file: Path | None, preset: str | None, overrides: list[str] | None
) -> "Study":
    if (run / "study.toml").exists():
        if study_file or preset or overrides:
            raise ConfigError(
                f"{run}: has its study.toml already, so --study, --preset and --set cannot change it: "
                "leave them out or name a new run folder"
            )
        return _import_study().open(run)
    if not (study_file or preset):
        raise ConfigError(
            f"{run}: no study.toml here: name a run folder, or give --study FILE or --preset NAME to "
            "start one"
        )
    return _new_study(load_study(study_file, preset, overrides or []), run)


def _import_study() -> "type[Study]":
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
    print(json.dumps(vars(plan), indent=2) if as_json else plan.as_text())


def _print_result(job: "Study", as_json: bool, quiet: bool) -> None:
    from lorascope.report.page import verdict_of

    verdict = verdict_of(job.run_dir)
    if as_json:
        print(
            json.dumps(
                {
                    "run": str(job.run_dir.path),
                    "report": str(job.run_dir.report_html),
                    "keep": verdict.keep,
                    "answer": verdict.answer,
                }
            )
        )
    elif quiet:
        print(job.run_dir.report_html)
    else:
        print(f"\n{verdict.answer}\nReport: {job.run_dir.report_html}")


@app.command(name="inspect", group=_FILES)
def inspect_adapter(
    file: Annotated[Path, Parameter(help="adapter file or PEFT folder, of any origin")],
    *,
    modules: Annotated[
        bool, Parameter(help="list every module with rank, alpha and norm", negative="")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Say what an adapter file is and whether WebUI, ComfyUI, Forge, diffusers, PEFT and sd-scripts would do
    anything with it.

    Nothing in the file is executed. Exit code 0: some program would change Stable Diffusion v1.5's pictures
    with it; 4: none would; 2: it could not be read.

    Example: lorascope inspect style.safetensors
    """
    from lorascope.adapters.inspection import inspect_file
    from lorascope.adapters.inspection_text import as_text

    inspection = inspect_file(file)
    print(json.dumps(inspection.as_dict(), indent=2) if as_json else as_text(inspection, modules))
    return EXIT_DONE if inspection.works_somewhere else EXIT_GATE_REJECTED


@app.command(group=_FILES)
def extract(
    base: Annotated[Path, Parameter(help="pipeline folder or checkpoint file that was tuned")],
    tuned: Annotated[Path, Parameter(help="what became of it")],
    out: Annotated[Path, Parameter(help="file or folder to write")],
    *,
    rank: RankOption = None,
    energy: EnergyOption = None,
    layout: AdapterFormatOption = "kohya",
    dtype: DtypeOption = None,
    name: AdapterName = None,
    force: Force = False,
) -> int:
    """Write the adapter nearest to the difference of two models, layer by layer.

    Example: lorascope extract v1-5.safetensors my-style.safetensors style.safetensors --rank 32
    """
    _set_level(False, False)
    from lorascope.adapters.lowrank import Checkpoint, Target, extract

    _write_cut(
        lambda: extract(Checkpoint(base), Checkpoint(tuned), Target(rank, energy)),
        out,
        layout,
        dtype,
        name,
        force,
    )
    return EXIT_DONE


@app.command(group=_FILES)
def resize(
    source: Annotated[Path, Parameter(help="adapter file or PEFT folder, of any program")],
    out: Annotated[Path, Parameter(help="file or folder to write")],
    *,
    rank: RankOption = None,
    energy: EnergyOption = None,
    layout: AdapterFormatOption = "kohya",
    dtype: DtypeOption = None,
    name: AdapterName = None,
    force: Force = False,
) -> int:
    """Write the best adapter of a lower rank; alpha falls with the rank, so the strength stays.

    Example: lorascope resize style.safetensors style-r8.safetensors --rank 8
    """
    _set_level(False, False)
    from lorascope.adapters.files import load_adapter
    from lorascope.adapters.lowrank import Target, resize

    _write_cut(lambda: resize(load_adapter(source), Target(rank, energy)), out, layout, dtype, name, force)
    return EXIT_DONE


def _write_cut(
    make: "Callable[[], Cut]",
    out: Path,
    layout: Literal["kohya", "peft", "diffusers"],
    dtype: Literal["fp16", "bf16", "fp32"] | None,
    name: str | None,
    force: bool,
) -> None:
    """Make a low-rank adapter, write it with its metadata and print what it kept."""
    from lorascope.adapters.export import default_dtype, made_plain, plain_name, require_free, write_adapter

    require_free(out, force)
    name = plain_name(name) if name else made_plain(out.stem)
    cut = make()
    written = write_adapter(cut.adapter, out, layout, dtype or default_dtype(layout), name)
    print(cut.summary(), file=sys.stderr)
    for note in cut.notes:
        print(f"note: {note}", file=sys.stderr)
    _print_written(written)


def _print_written(written: "Written") -> None:
    print(written.path)
    print(f"{size(written.num_bytes)}, rounding error {written.rounding:.2g} (relative l2)", file=sys.stderr)
    for note in written.notes:
        print(f"note: {note}", file=sys.stderr)


def _set_level(quiet: bool, verbose: bool) -> None:
    configure_logging(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


def _terminate(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # it warns at import that torchvision, which is not needed, is missing
    signal.signal(signal.SIGTERM, _terminate)
    debug = os.environ.get("LORASCOPE_DEBUG") == "1"
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return result if isinstance(result, int) else EXIT_DONE
    except CycloptsError as error:
        print(f"lorascope: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_INPUT
    except LorascopeError as error:
        if debug:
            traceback.print_exc()
        print(f"lorascope: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("lorascope: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_DONE
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(
                f"lorascope: a fault of ours: {type(error).__name__}: {error} (LORASCOPE_DEBUG=1 shows "
                "where)",
                file=sys.stderr,
            )
        return EXIT_FAULT
