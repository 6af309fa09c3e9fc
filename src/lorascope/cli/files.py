"""Adapter files: export, conversion, inspection and lower ranks."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from lorascope.cli.options import AsJson, Run, set_level
from lorascope.config import load_study
from lorascope.console import say, size
from lorascope.errors import EXIT_DONE, EXIT_GATE_REJECTED, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorascope.adapters.files import Written
    from lorascope.adapters.lowrank import Cut

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
AsLora = Annotated[
    bool, Parameter(help="write T-LoRA as LoRA of its full rank, which is not what was trained", negative="")
]
Force = Annotated[bool, Parameter(help="replace what is there", negative="")]


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
    strength: Annotated[
        float,
        Parameter(help="weight to put into alpha: 1 in any program then draws what this drew"),
    ] = 1.0,
    as_lora: AsLora = False,
    force: Force = False,
) -> int:
    """Write a trained arm as a file for other programs, or the base with the arm merged in.

    For example:

    lorascope export runs/paper --arm r16                              for WebUI, Forge and ComfyUI

    lorascope export runs/paper --arm r16 --format diffusers           one file for load_lora_weights

    lorascope export runs/paper --arm r16 --format merged-ldm          one checkpoint file, nothing else
    needed

    lorascope export runs/paper --arm r16 --strength 0.6               weight 1 draws what 0.6 drew
    """
    set_level(False, False)
    if not (run / "study.toml").is_file():
        raise ConfigError(f"{run}: no study.toml here: name a run folder")
    from lorascope.adapters.export import export_arm
    from lorascope.run_folder import RunDir

    config = load_study(run / "study.toml", environment={})
    run_dir = RunDir(run)
    written = export_arm(run_dir, config, arm, layout, out, dtype, name, checkpoint, force, strength, as_lora)
    _print_written(written)
    return EXIT_DONE


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
    as_lora: AsLora = False,
    force: Force = False,
) -> int:
    """Write an adapter of another program in another format.

    For example:

    lorascope convert pytorch_lora_weights.safetensors style.safetensors          diffusers' file for WebUI

    lorascope convert style.safetensors style-peft --format peft                  a PEFT folder to train on

    lorascope convert style.safetensors merged --format merged-diffusers --base
    stable-diffusion-v1-5/stable-diffusion-v1-5
    """
    set_level(False, False)
    from lorascope.adapters.export import convert as convert_adapter

    _print_written(convert_adapter(source, out, layout, dtype, name, base, force, as_lora))
    return EXIT_DONE


def inspect(
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
    from lorascope.adapters.inspection import inspect_adapter
    from lorascope.adapters.inspection_text import as_text

    inspection = inspect_adapter(file)
    say(json.dumps(inspection.as_dict(), indent=2) if as_json else as_text(inspection, modules))
    return EXIT_DONE if inspection.works_somewhere else EXIT_GATE_REJECTED


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
    set_level(False, False)
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
    set_level(False, False)
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
    say(cut.summary(), file=sys.stderr)
    for note in cut.notes:
        say(f"note: {note}", file=sys.stderr)
    _print_written(written)


def _print_written(written: "Written") -> None:
    say(written.path)
    say(f"{size(written.num_bytes)}, rounding error {written.rounding:.2g} (relative l2)", file=sys.stderr)
    for note in written.notes:
        say(f"note: {note}", file=sys.stderr)
