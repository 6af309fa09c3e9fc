"""Which training and held-out pictures an arm's drawings lie nearest to: compared, chosen, kept in
`copying.json`.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lorascope.errors import StorageError
from lorascope.evaluation.copying import COPY_THRESHOLD, Copying, copy_ratio
from lorascope.evaluation.sweep_rows import SweepRow
from lorascope.run_folder import RunDir
from lorascope.shapes import Each, Maybe, Number, Text, find_fault
from lorascope.store import digest_json, read_json, write_bytes, write_json

MAX_PAIRS = 4
_FORMAT = 1  # grows where an earlier reader would misread a file; new keys alone do not count
_KEPT_SIDE_PX = 256  # pictures are kept for a look, not for measuring again
_NEIGHBOUR: Any = {"id": str, "picture": str, "distance": Number, "ratio": Number}
_PAIR: Any = {"drawing": str, "prompt": str, "seed": int, "training": _NEIGHBOUR, "heldout": _NEIGHBOUR}
_SHAPE: Any = {
    "format": int,
    "arms": Each(
        {
            "num_drawings": int,
            "num_pictures": int,
            "training_share": Maybe(Number),
            "heldout_share": Maybe(Number),
            "pairs": [_PAIR],
            "reason": Text,
        }
    ),
    "digest": str,
}

Pictures = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class Comparison:
    """Drawings against training pictures and as many held-out ones of their size.

    `places` say where the compared pictures stand among those given, training ones first. Without a
    comparison `reason` says why.
    """

    training: Copying | None = None
    heldout: Copying | None = None
    places: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    reason: str | None = None


@dataclass(frozen=True)
class Neighbour:
    """The picture nearest to a drawing: its id in `data.json`, where a copy of it lies in the run folder, and
    its distance and ratio as `evaluation.copying.Copying` has them.
    """

    id: str
    picture: str
    distance: float
    ratio: float

    @property
    def is_copied(self) -> bool:
        """Whether the ratio says that the drawing is a copy of it."""
        return self.ratio < COPY_THRESHOLD


@dataclass(frozen=True)
class Pair:
    """A drawing, its path in the run folder, beside the training picture nearest to it, and beside the
    nearest held-out one, which no arm ever saw.
    """

    drawing: str
    prompt: str
    seed: int
    training: Neighbour
    heldout: Neighbour


@dataclass(frozen=True)
class Nearest:
    """How near an arm's drawings come: the shares of them that copy a training and a held-out picture, and
    the pairs of the smallest ratio. `num_pictures` were compared of either kind; shares are None, with a
    `reason`, where none were.
    """

    num_drawings: int
    num_pictures: int = 0
    training_share: float | None = None
    heldout_share: float | None = None
    pairs: tuple[Pair, ...] = ()
    reason: str | None = None


def compare(drawn: Pictures, training: Pictures, heldout: Pictures) -> Comparison:
    """Drawings against training pictures and as many held-out ones, of those that have the drawings' size:
    the ratio of distances falls with the number of pictures.
    """
    if not drawn:
        return Comparison(reason="nothing was drawn at full strength")
    shape = drawn[0].shape
    found = [
        [place for place, picture in enumerate(pictures) if picture.shape == shape]
        for pictures in (training, heldout)
    ]
    count = min(map(len, found))
    if count < 2:
        height, width, _ = shape
        return Comparison(
            reason=f"{len(found[0])} training and {len(found[1])} held-out pictures of the drawings' size, "
            f"{width} x {height}: it takes at least 2 of either"
        )
    first, second = (
        copy_ratio(np.stack(drawn), np.stack([pictures[place] for place in places[:count]]))
        for pictures, places in zip((training, heldout), found, strict=True)
    )
    return Comparison(first, second, (tuple(found[0][:count]), tuple(found[1][:count])))


def keep_nearest(
    run: RunDir,
    rows: Mapping[str, Sequence[SweepRow]],
    compared: Mapping[str, Comparison],
    training: Pictures,
    heldout: Pictures,
) -> None:
    """Write `copying.json` with the nearest pairs of every arm, and those pictures into `copying/`.

    `rows` are the drawings that were compared, in their order; `training` and `heldout` are the first
    pictures of these kinds that `data.json` lists. Raises `StorageError` as writing does.
    """
    data = run.data()
    kinds = {"training": (data["train"], training), "heldout": (data["heldout"], heldout)}
    pictures: dict[str, NDArray[np.uint8]] = {}
    arms: dict[str, Any] = {}
    for arm, comparison in compared.items():
        first, second = comparison.training, comparison.heldout
        if first is None or second is None:
            arms[arm] = asdict(Nearest(len(rows[arm]), reason=comparison.reason))
            continue
        pairs = []
        for index in np.lexsort((first.distances, first.ratios))[:MAX_PAIRS].tolist():
            neighbours = []
            for found, places, (examples, given) in zip(
                (first, second), comparison.places, kinds.values(), strict=True
            ):
                place = places[found.nearest[index]]
                path = f"{run.copying_dir.name}/{examples[place]['digest'][:16]}.png"
                pictures[path] = given[place]
                distance, ratio = float(found.distances[index]), float(found.ratios[index])
                neighbours.append(Neighbour(examples[place]["id"], path, distance, ratio))
            row = rows[arm][index]
            pairs.append(Pair(row.image, row.prompt, row.seed, *neighbours))
        count = len(comparison.places[0])
        arms[arm] = asdict(Nearest(len(rows[arm]), count, first.share, second.share, tuple(pairs)))
    for path, picture in pictures.items():
        write_bytes(run.path / path, _as_png(picture))
    values = {"format": _FORMAT, "arms": arms}
    write_json(run.copying_json, {**values, "digest": digest_json(values)})


def _as_png(picture: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(picture)
    image.thumbnail((_KEPT_SIDE_PX, _KEPT_SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def read_nearest(run: RunDir) -> dict[str, Nearest] | None:
    """What `copying.json` holds of every arm; None for a run that has none, as those diagnosed by earlier
    versions. Raises `StorageError` where it is damaged or of a later format.
    """
    path = run.copying_json
    if not path.exists():
        return None
    values = read_json(path)
    if isinstance(values, dict) and isinstance(values.get("format"), int) and values["format"] > _FORMAT:
        raise StorageError(
            f"{path}: is of format {values['format']}, this version reads up to {_FORMAT}: update lorascope"
        )
    reason = find_fault(values, _SHAPE)
    if reason is None and values["digest"] != digest_json(
        {key: item for key, item in values.items() if key != "digest"}
    ):
        reason = "its content is not what was written, by its digest"
    if reason:
        raise StorageError(
            f"{path}: damaged ({reason}): delete it and diagnosis.json, and run `lorascope diagnose "
            f"{run.path}` again"
        )
    return {arm: _nearest(found) for arm, found in values["arms"].items()}


def _nearest(found: Mapping[str, Any]) -> Nearest:
    def neighbour(item: Mapping[str, Any]) -> Neighbour:
        return Neighbour(item["id"], item["picture"], item["distance"], item["ratio"])

    pairs = tuple(
        Pair(
            pair["drawing"],
            pair["prompt"],
            pair["seed"],
            neighbour(pair["training"]),
            neighbour(pair["heldout"]),
        )
        for pair in found["pairs"]
    )
    shares = found["training_share"], found["heldout_share"]
    return Nearest(found["num_drawings"], found["num_pictures"], *shares, pairs, found["reason"])
