"""What the captions say, and which subjects the base learns to draw."""

import re

import numpy as np

from recipes.pocket.config import CARTOON_VENDOR, NUM_CAPTIONS_PER_SUBJECT, SCORER_TEST_VENDOR, UnetConfig
from recipes.pocket.drawings import Drawings, Subject

MAX_KEYWORDS = 4

# emojibase's subgroups whose subjects a small model can draw: hearts, animals, plants, food, vehicles,
# sky and weather, celebrations, sports, games, clothes, music, light, writing, tools.
KNOWN_SUBGROUPS = (14, *range(34, 48), 50, 53, 54, 55, 56, 59, 60, 61, 62, 63, 65, 68, 71, 75, 77, 78)
# Faces of people, clocks, signs, scenes that vendors draw too differently, and near twins of other subjects.
NOT_DRAWN = (
    r"clock|moon face|sun with face|wind face|face with|front facing|oncoming|sign$|stop|signal|traffic|medal"
    r"|button|suit$|joker|mahjong|playing cards|dolls|clothes|swimsuit|bikini|kimono|performing|spiral "
    r"calendar"
    r"|(waxing|waning|first quarter|last quarter|new|full) .*moon|new moon|full moon|behind "
    r"(small|large|rain)"
    r"|cloud with (snow|lightning|rain)$|admission|envelope|ceremony|streamer|tilted right|dvd|pen$|black nib"
    r"|with key|locked with|hammer and|closed umbrella|umbrella on ground|umbrella with|snowman without"
    r"|guide dog|service dog|small airplane|departure|arrival|articulated|minibus|trolleybus|light rail|metro"
    r"|station|monorail|mountain railway|suspension|cableway|tramway|railway car|high speed|motorway"
    r"|railway track|wheelchair|foggy|dusk|night|cityscape|sunrise|sunset|milky way|landslide|national park"
    r"|running shirt|martial|game$|hockey|lacrosse|flag in hole|rice cracker|roasted|oden|fish cake|dango"
    r"|shallow pan|stuffed|bento|curry rice|herb$|sheaf|wilted|blossom$|rosette|dragon face|two hump"
    r"|water buffalo|^ox$|^ewe$|^boar$|paw prints|pig nose|black cat|black bird|microbe|motor boat|speedboat"
    r"|passenger ship|ferry$|construction|police car light|videocassette|film|projector|camera with|tear off"
    r"|chart|glasses$|womans|mans shoe|pile|beverage box|sake|pouring|clinking|without handle|letter|ribbon$"
    r"|(growing|beating|revolving|two|on|orange|yellow|brown|black|white|grey|light "
    r"blue|pink|purple|green|blue) hearts?$"
    r"|heart exclamation|heart decoration|on fire|mending|^fog$|sparkler|barber|^seat$|tanabata|pine "
    r"dec|prayer"
    r"|^memo$|^link$|clamp|^ticket$|goal net|confetti|slot"
)


def subject_captions(subject: Subject, seed: int) -> list[str]:
    """The fixed caption variants of one subject.

    The name, the name with some keywords (half of the variants), and keywords alone.
    A subject without keywords gets its name every time. Reads no global randomness:
    the same subject and seed give the same captions.
    """
    if not subject.keywords:
        return [subject.name] * NUM_CAPTIONS_PER_SUBJECT
    generator = np.random.default_rng([seed, *subject.id.encode()])
    captions = [subject.name]
    for variant in range(1, NUM_CAPTIONS_PER_SUBJECT):
        count = min(len(subject.keywords), int(generator.integers(1, MAX_KEYWORDS)))
        keywords = list(generator.permutation(subject.keywords)[:count])
        # Of eight: 0 and 5 the name, 1-4 the name and keywords, 6 and 7 keywords alone.
        if variant == 5:
            captions.append(subject.name)
        elif variant < 5:
            captions.append(", ".join([subject.name, *keywords]))
        else:
            captions.append(", ".join(keywords))
    return captions


def prompt_of(subject: Subject) -> str:
    """The caption a reader would type for a subject: its name and its first two keywords."""
    distinct = [word for word in subject.keywords if word.rstrip("s") not in subject.name]
    return ", ".join([subject.name, *distinct[:2]])


def drawn_by(drawings: Drawings) -> dict[str, set[str]]:
    """Which vendors draw each subject."""
    vendors: dict[str, set[str]] = {}
    for vendor, subject_id in zip(drawings.vendor, drawings.subject_id, strict=True):
        vendors.setdefault(subject_id, set()).add(vendor)
    return vendors


def known_subjects(drawings: Drawings, config: UnetConfig) -> list[Subject]:
    """The subjects the U-Net learns: drawn by every vendor that teaches, tests or adapts it."""
    needed = {*config.vendors, CARTOON_VENDOR, SCORER_TEST_VENDOR}
    vendors = drawn_by(drawings)
    return [
        subject
        for subject in drawings.subjects.values()
        if needed <= vendors.get(subject.id, set()) and (not config.simple_only or _is_simple(subject))
    ]


def _is_simple(subject: Subject) -> bool:
    return subject.subgroup in KNOWN_SUBGROUPS and not re.search(NOT_DRAWN, subject.name)
