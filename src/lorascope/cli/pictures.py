"""Pictures before a run: a look at them, and captions."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from lorascope.cli.options import AsJson, Overrides, set_level
from lorascope.config import load_study
from lorascope.console import say
from lorascope.errors import EXIT_DONE, EXIT_INPUT, EXIT_RUN_FAILED


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
    set_level(quiet, False)
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

    from lorascope.base.configs import count_tokens, load_tokenizer
    from lorascope.console import track
    from lorascope.data.check import check_data
    from lorascope.data.examples import check_source

    tokenizer = load_tokenizer(config.base)
    with track("check", 1, "pictures") as task:

        def show(done: int, total: int) -> None:
            task.set_total(total)
            task.advance(done - task.completed)

        checked = check_source(
            config.data, partial(count_tokens, tokenizer), tokenizer.model_max_length, show
        )
    result = check_data(checked, tokenizer.model_max_length)
    sheets = result.draw(out) if out else []
    if as_json:
        say(json.dumps({**result.as_dict(), "sheets": [str(path) for path in sheets]}, indent=2))
    elif not quiet:
        hint = []
        if not out and result.dataset and result.dataset.summary["duplicates"]:
            hint = ["Duplicates are drawn side by side with --out FOLDER."]
        say(result.as_text(), *(f"Drawn: {path}" for path in sheets), *hint, sep="\n")
    return EXIT_DONE if result.dataset else EXIT_INPUT


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
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Parameter(help="where the model runs")] = "auto",
    as_json: AsJson = False,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], help="no progress", negative="")] = False,
) -> int:
    """Caption pictures with BLIP. Captions that are there are kept; the same command again goes on where it
    stopped.

    Exit code 3 says that some pictures were left without a caption; the result names them.

    Example: lorascope caption my-pictures --prompt "a cartoon of"
    """
    set_level(quiet, False)
    from lorascope.console import track
    from lorascope.data.captioning import caption_folder, load_captioner
    from lorascope.machine.device import choose_device

    captioner = load_captioner(model, revision, prompt, max_tokens, choose_device(device))
    with track("caption", 0, "pictures") as task:

        def show(done: int, total: int, caption: str) -> None:
            task.set_total(total)
            task.advance(done - task.completed, caption)

        result = caption_folder(
            folder, captioner.caption, out=out, batch_size=batch_size, overwrite=overwrite, progress=show
        )
    say(json.dumps(result.as_dict(), indent=2) if as_json else result.as_text())
    return EXIT_DONE if result.is_complete else EXIT_RUN_FAILED
