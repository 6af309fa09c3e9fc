"""Duplicates among the examples, and which of them are held out: neither follows the order of the rows."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lorascope.console import log
from lorascope.data.duplicates import MOST_FOR_SECOND_LOOK, alike_pairs, join_groups, near_groups
from lorascope.data.examples import Picture
from lorascope.data.names import name_some

_LEAST_BORDER = 0.02  # of a side
_SHOWN_GROUPS = 2


def drop_exact(pictures: Iterable[Picture]) -> tuple[list[Picture], list[dict[str, Any]]]:
    """Pictures of which no two share bytes or decoded pixels, and a note on each set of equal ones."""
    equal: dict[bytes, list[Picture]] = {}
    for picture in sorted(
        pictures,
        key=lambda picture: (
            picture.split != "train",
            picture.example.digest,
            picture.example.caption,
            picture.example.id,
        ),
    ):
        equal.setdefault(picture.facts.pixel_digest, []).append(picture)
    notes = []
    for kept, *dropped in equal.values():
        if dropped:
            differ = any(picture.example.caption != kept.example.caption for picture in dropped)
            action = f"kept {kept.example.id}, dropped the other{'s' if len(dropped) > 1 else ''}" + (
                "; their captions differ" if differ else ""
            )
            notes.append(
                {
                    "kind": "exact",
                    "ids": [picture.example.id for picture in (kept, *dropped)],
                    "action": action,
                }
            )
    return [kept for kept, *_ in equal.values()], notes


def group_near(pictures: Sequence[Picture], max_bits: int) -> list[list[Picture]]:
    """Groups of near duplicates, most of one picture, each in the order of digests."""
    facts = [picture.facts for picture in pictures]
    thumbnails, contents = (
        np.frombuffer(b"".join(parts), np.uint8).reshape(len(facts), -1)
        for parts in ((fact.thumbnail for fact in facts), (fact.content for fact in facts))
    )
    numbers = near_groups(np.array([fact.hash for fact in facts], np.uint64), thumbnails, max_bits)
    if len(facts) > MOST_FOR_SECOND_LOOK:
        log.warning(
            "data     shifted, mirrored and brighter copies are looked for among %d pictures at most, "
            "here are %d",
            MOST_FOR_SECOND_LOOK,
            len(facts),
        )
    elif max_bits:
        shapes = np.array([fact.content_width_px / fact.content_height_px for fact in facts])
        shares = np.array(
            [(f.content_width_px / f.width_px, f.content_height_px / f.height_px) for f in facts]
        )
        has_border = shares.min(axis=1) < 1 - _LEAST_BORDER
        numbers = join_groups(numbers, alike_pairs(contents, shapes, has_border))
    members: dict[int, list[Picture]] = {}
    for number, picture in zip(numbers.tolist(), pictures, strict=True):
        members.setdefault(number, []).append(picture)
    by_digest = [sorted(group, key=lambda picture: picture.example.digest) for group in members.values()]
    return sorted(by_digest, key=lambda group: group[0].example.digest)


def own_split(groups: Iterable[Sequence[Picture]]) -> tuple[set[str], set[str]]:
    """Ids of the source's held-out pictures, and of those that duplicate a training picture and must be
    dropped.
    """
    heldout_ids: set[str] = set()
    leaked_ids: set[str] = set()
    for group in groups:
        ids = {picture.example.id for picture in group if picture.split != "train"}
        (heldout_ids if len(ids) == len(group) else leaked_ids).update(ids)
    return heldout_ids, leaked_ids


def draw_split(groups: Sequence[Sequence[Picture]], share: float) -> set[str]:
    """Ids of the pictures to hold out: whole groups, in an order independent of that in which subsets are
    taken.
    """
    num_pictures = sum(map(len, groups))
    num_wanted = min(max(1, round(share * num_pictures)), num_pictures - 1)
    heldout_ids: set[str] = set()
    for group in sorted(groups, key=lambda group: hashlib.sha256(group[0].example.digest.encode()).digest()):
        if len(heldout_ids) + len(group) <= num_wanted:
            heldout_ids.update(picture.example.id for picture in group)
    return heldout_ids


def describe_near(groups: Iterable[Sequence[Picture]], leaked_ids: set[str]) -> list[dict[str, Any]]:
    """A note on each group of more than one picture; `leaked_ids` are those that were dropped."""
    notes = []
    for group in groups:
        ids = [picture.example.id for picture in group]
        if len(ids) > 1:
            leaked = [picture_id for picture_id in ids if picture_id in leaked_ids]
            action = (
                f"dropped from the held-out pictures: {', '.join(leaked)}"
                if leaked
                else "kept on the same side of the split"
            )
            notes.append({"kind": "near", "ids": ids, "action": action})
    return notes


def describe_duplicates(notes: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on the near and one on the exact duplicates of `data.json`: how many there are, what was
    done with them, and pictures of the largest groups.
    """
    sentences = []
    for kind, done, mark, words in (
        ("near", "kept on one side of the split", "dropped from", "held-out pictures of {} groups dropped"),
        ("exact", "one of each group kept", "captions differ", "captions differ in {} groups"),
    ):
        groups = sorted((note for note in notes if note["kind"] == kind), key=lambda note: -len(note["ids"]))
        if not groups:
            continue
        num_pictures, plural = sum(len(note["ids"]) for note in groups), "s" if len(groups) > 1 else ""
        sentence = f"{num_pictures:,} pictures in {len(groups):,} group{plural} of {kind} duplicates, {done}"
        if num_odd := sum(mark in note["action"] for note in groups):
            numbered = words.format(f"{num_odd:,}")
            sentence += f", {numbered if num_odd > 1 else numbered.replace('groups', 'group')}"
        sentence += f": {'; '.join(name_some(note['ids']) for note in groups[:_SHOWN_GROUPS])}"
        if len(groups) > _SHOWN_GROUPS:
            sentence += f"; and {len(groups) - _SHOWN_GROUPS:,} more"
        sentences.append(sentence)
    return sentences
