"""More: the benchmark, presets, the keys of a study file, facts for a bug report."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from lorascope.cli.options import AsJson, set_level
from lorascope.config import preset_names, preset_text
from lorascope.console import log, say
from lorascope.errors import EXIT_DONE, EXIT_RUN_FAILED, ConfigError
from lorascope.reference import reference_table
from lorascope.sections import BaseSection

if TYPE_CHECKING:
    from lorascope.machine.fast_paths import FastPaths


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
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Parameter(help="where it runs")] = "auto",
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
    set_level(quiet, False)
    import torch

    from lorascope.bench.race import Protocol
    from lorascope.bench.run import run_alone, run_bench
    from lorascope.bench.table import as_markdown
    from lorascope.machine.device import choose_device

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
        alone_facts = run_alone(
            base, device, names[0], protocol.num_steps, peers, fast_paths=_fast_paths(base, device)
        )
        say(json.dumps(alone_facts, indent=2))
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
        fast_paths=_fast_paths(base, device),
    )
    say(json.dumps(result, indent=2) if as_json else as_markdown(result), end="" if not as_json else "\n")
    return (
        EXIT_RUN_FAILED if any(row["status"] == "failed" for row in result["entries"].values()) else EXIT_DONE
    )


def _fast_paths(base: str, device_kind: str) -> "FastPaths":
    """What the doctor found to be right for such a base on this GPU, as a study takes it; on a CPU all."""
    from lorascope.base.configs import SD15_DIR
    from lorascope.doctor.examination import Subject, recall_examination
    from lorascope.machine.device import choose_device
    from lorascope.machine.fast_paths import ALL_PATHS

    device = choose_device(device_kind)
    if device.type != "cuda":
        return ALL_PATHS
    section = BaseSection(model=str(SD15_DIR) if base == "sd15" else base)
    if (examination := recall_examination(Subject(section, device, "bf16"))) is None:
        log.info("bench    fast paths were not checked here for such a base: lorascope doctor does")
        return ALL_PATHS
    for finding in examination.barred:
        log.warning("doctor   %s: not used in this benchmark", finding.as_line())
    return examination.fast_paths


def presets(name: Annotated[str | None, Parameter(help="preset to print as TOML")] = None, /) -> int:
    """List the presets, or print one as TOML to copy: lorascope presets recommended > my.toml"""
    if name is not None:
        say(preset_text(name), end="")
        return EXIT_DONE
    for preset in preset_names():
        comment = preset_text(preset).splitlines()[0].removeprefix("# ")
        say(f"{preset:<14} {comment}")
    return EXIT_DONE


def keys() -> int:
    """Print every key of a study file with type, default and meaning (Markdown)."""
    say(reference_table(), end="")
    return EXIT_DONE


def env() -> int:
    """Print what a bug report needs: versions, device, threads, caches and variables."""
    from lorascope.data.encoding import default_cache_dir
    from lorascope.doctor.examination import versions
    from lorascope.machine.device import choose_device

    facts = {**versions(choose_device("auto")), "cache": str(default_cache_dir())}
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        facts[name] = os.environ.get(name, "")
    for key, value in facts.items():
        say(f"{key:<22}{value}")
    return EXIT_DONE
