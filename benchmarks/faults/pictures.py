"""A sheet of pictures: what each cause looks like at full strength, beside the base's drawings."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.arms import BY_NAME, Kind
from PIL import Image, ImageDraw, ImageFont

from lorascope.diagnosis.words import WORDS
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.sweep_rows import Point, SweepRow, read_sweep
from lorascope.run_folder import RunDir

# One arm of each cause that pictures show, by name, in the order of the sheet.
SHOWN = (
    "healthy-r16-lr2e-5",
    "little-r16-lr1e-6",
    "strong-r16-lr3e-4",
    "diverged-r64-lr4e-3",
    "overfit-r16-longer",
    "drift-r16-lr5e-4",
)
_NUM_PROMPTS = 7
_SIDE_PX, _GAP_PX, _HEAD_PX, _LABEL_PX, _TEXT_PX = 96, 6, 44, 190, 13


def draw_causes(out: Path, seed: int, path: Path) -> None:
    """Write the sheet of a training seed's finished studies below `out` as PNG.

    The base's row comes first, then one for each arm of `SHOWN`: the same prompts from the same noise. Raises
    as reading a run folder does.
    """
    rows: list[tuple[str, list[SweepRow], RunDir]] = []
    for name in (None, *SHOWN):
        kind: Kind = "gross" if name is None else BY_NAME[name].kind
        run = RunDir(out / f"{kind}-s{seed}")
        sweep = read_sweep(run)
        guidance = sweep.points[0].guidance
        point = Point(BASE, "last", 0.0, guidance) if name is None else Point(name, "last", 1.0, guidance)
        label = "the base" if name is None else f"{WORDS[BY_NAME[name].label]}\n{name}"
        found = [row for row in sweep.of(point) if row.category == "normal"]
        first = min(row.seed for row in found)
        rows.append((label, [row for row in found if row.seed == first], run))
    prompts = [row.prompt for row in rows[0][1][:_NUM_PROMPTS]]
    sheet = _sheet(prompts, [(label, _pictures(run, found, prompts)) for label, found, run in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _pictures(run: RunDir, rows: Sequence[SweepRow], prompts: Sequence[str]) -> list[Path]:
    by_prompt = {row.prompt: run.path / row.image for row in rows}
    return [by_prompt[prompt] for prompt in prompts]


def _sheet(prompts: Sequence[str], rows: Sequence[tuple[str, Sequence[Path]]]) -> Image.Image:
    """Pictures in a grid, labels at the left and prompts above."""
    step = _SIDE_PX + _GAP_PX
    size = _LABEL_PX + step * len(prompts), _HEAD_PX + step * len(rows)
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(_TEXT_PX)
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        text = "\n".join(textwrap.wrap(prompt, _SIDE_PX // 7)[:2])
        pen.multiline_text((_LABEL_PX + column * step, 4), text, "black", font)
    for index, (label, paths) in enumerate(rows):
        top = _HEAD_PX + index * step
        pen.multiline_text((6, top + 6), label, "black", font)
        for column, path in enumerate(paths):
            with Image.open(path) as picture:
                drawn = picture.convert("RGB").resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BICUBIC)
            sheet.paste(drawn, (_LABEL_PX + column * step, top))
    return sheet
