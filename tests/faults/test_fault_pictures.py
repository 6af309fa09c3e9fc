"""The sheet of causes: a row each, the same prompts throughout."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from benchmarks.faults.arms import BY_NAME, KINDS
from benchmarks.faults.pictures import SHOWN, draw_causes
from PIL import Image

from lorascope.diagnosis.words import CAUSES
from lorascope.evaluation.scores import BASE
from lorascope.evaluation.sweep_rows import write_sweep
from lorascope.run_folder import RunDir
from synthetic_sweeps import make_sweep, point_rows


def test_every_cause_that_shows_has_a_row_beside_the_base(tmp_path: Path) -> None:
    shades = {name: 30 * index for index, name in enumerate((BASE, *SHOWN))}
    drawn = [30.0] * 16, [0.1] * 16
    for kind in KINDS:
        run = RunDir(tmp_path / f"{kind}-s3")
        rows = point_rows(BASE, 0.0, drawn)
        for name in (name for name in SHOWN if BY_NAME[name].kind == kind):
            for row in point_rows("r16-s3", 1.0, drawn):
                rows.append(replace(row, arm=name, image=row.image.replace("r16-s3", name)))
        for row in rows:
            path = run.path / row.image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (shades[row.arm],) * 3).save(path)
        write_sweep(run, make_sweep(rows))
    draw_causes(tmp_path, 3, tmp_path / "docs" / "causes.png")
    sheet = np.array(Image.open(tmp_path / "docs" / "causes.png"))
    rows_at = range(44 + 48, sheet.shape[0], 102)  # the middle of each picture
    assert [sheet[y, 190 + 48].tolist() for y in rows_at] == [[shade] * 3 for shade in shades.values()]
    assert [sheet[y, 190 + 48 + 6 * 102].tolist() for y in rows_at] == [[s] * 3 for s in shades.values()]
    unseen = {"numerical", "file_fault", "cannot_tell"}
    assert {BY_NAME[name].label for name in SHOWN} == set(CAUSES) - unseen
