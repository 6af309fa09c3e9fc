"""Whether the kept arm copies training pictures: what was counted, and its nearest pairs, in words."""

from lorascope.diagnosis.nearest import Nearest, Pair
from lorascope.evaluation.choice import NO_SWEEP
from lorascope.report.evidence import Facts, as_sentence
from lorascope.report.tables import cell

_RULE = (
    "A drawing counts as a copy where the picture nearest to it is less than a third as far away as the "
    "second nearest (Gu et al. 2023)."
)


def nearest_of_kept(facts: Facts) -> Nearest | None:
    """What is known of the kept arm, where pairs of it were kept."""
    keep = facts.verdict.keep if facts.verdict else None
    found = (facts.nearest or {}).get(keep) if keep else None
    return found if found is not None and found.pairs else None


def copying_texts(facts: Facts) -> tuple[str, ...]:
    """How many of the kept arm's drawings copy a picture, or why that is not told; each some sentences."""
    keep = facts.verdict.keep if facts.verdict else None
    if facts.nearest is None:
        if facts.diagnosis is None:
            return (as_sentence(NO_SWEEP),)
        return (
            "Not shown: the version that diagnosed this run did not keep which pictures are nearest. To "
            "have them, delete diagnosis.json and run `lorascope diagnose RUN`.",
        )
    if keep is None:
        return ("No arm is kept, so no pictures are shown; copying.json has those of every arm.",)
    found = facts.nearest.get(keep)
    shares = (found.training_share, found.heldout_share) if found else ()
    copied = [f"{cell(100 * share, '.0f').text} %" for share in shares if share is not None]
    if found is None or len(copied) < 2:
        return (f"Not measured: {found.reason if found else f'copying.json has nothing of {keep}'}.",)
    num_train = facts.data["num_train"] if facts.data else 0
    of_all = f" of the {num_train:,}" if num_train > found.num_pictures else ""
    counted = (
        f"{keep} drew {found.num_drawings} pictures at full strength. Each was compared with "
        f"{found.num_pictures}{of_all} training pictures and with {found.num_pictures} held-out ones. "
        f"{_RULE} By that {copied[0]} of the drawings copy a training picture, and {copied[1]} a held-out "
        "one, which no arm ever saw: that much is chance."
    )
    few = "is the drawing" if len(found.pairs) == 1 else f"are the {len(found.pairs)} drawings"
    shown = (
        f"Below {few} with the smallest ratio to a training picture. Nobody picked them by eye. Distance is "
        "the root mean square difference of pixel values, 0 to 1: a copy that is shifted, mirrored or of "
        "other colours is far away by it, and a copy of one of two near twins is not counted."
    )
    return counted, shown


def say_pair(pair: Pair) -> str:
    """Distances and ratios of a drawing, and what they make of it."""
    training, heldout = pair.training, pair.heldout
    verdict = "a copy" if training.is_copied else "no copy"
    return (
        f"Nearest training picture {training.id}: distance {training.distance:.3f}, ratio "
        f"{training.ratio:.2f}, {verdict}. Nearest held-out picture {heldout.id}: distance "
        f"{heldout.distance:.3f}, ratio {heldout.ratio:.2f}."
    )


def caption_of(facts: Facts, id_: str) -> str:
    """The caption of a picture of the data, empty where it has none."""
    rows = [*facts.data["train"], *facts.data["heldout"]] if facts.data else []
    return next((str(row["caption"]) for row in rows if row["id"] == id_), "")
