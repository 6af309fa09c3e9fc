"""Whether a run was a fair test: the conditions its arms were compared under, one by one."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lorascope.adapters.schedule import schedule_of
from lorascope.evaluation.scores import ALL, BASE, NOISE, REAL, SHUFFLED
from lorascope.report.evidence import NOT_MEASURED, Facts, count

SIGNS = {"yes": "\N{CHECK MARK}", "caution": "!", "no": "\N{MULTIPLICATION X}", NOT_MEASURED: "?"}


@dataclass(frozen=True)
class Condition:
    """One condition of a fair test: `state` is yes, caution, no or not measured."""

    name: str
    state: str
    text: str

    @property
    def css(self) -> str:
        """The state as the page's style sheet names it."""
        return self.state.replace(" ", "-")

    @property
    def sign(self) -> str:
        """The state as a character, so that it is not told by colour alone."""
        return SIGNS[self.state]


def judge_conditions(facts: Facts) -> list[Condition]:
    """Whether the arms were compared under equal conditions, one by one."""
    conditions = [
        _same_training(facts),
        _same_length(facts),
        _same_noise(facts),
        *_leaks(facts),
        _training_seeds(facts),
        _same_gain(facts),
    ]
    return [
        *conditions,
        _merged(facts),
        _base_quality(facts),
        _scorer_quality(facts),
        _scorer_apart(facts),
        _all_finished(facts),
    ]


def _same_training(facts: Facts) -> Condition:
    name = "Same order, noise and timesteps in training"
    seeds: dict[str, set[int]] = {}
    for arm in facts.arms:
        setting = facts.settings[arm]
        seeds.setdefault(setting.but_seed, set()).add(setting.seed)
    used = sorted({seed for group in seeds.values() for seed in group})
    shown = ", ".join(map(str, used))
    if len(facts.arms) < 2:
        return Condition(name, NOT_MEASURED, "Only one arm finished: there is nothing to hold equal.")
    if all(group == set(used) for group in seeds.values()):
        return Condition(
            name,
            "yes",
            "Order, noise, timesteps and dropped captions are functions of (training seed, position), "
            f"and every setting has training seed {shown}.",
        )
    return Condition(
        name,
        "caution",
        f"Settings were trained with different seeds out of {shown}: a part of their difference is the "
        "seed's.",
    )


def _same_length(facts: Facts) -> Condition:
    name = "Same training length"
    lengths = {
        arm: (
            facts.training[arm].get("steps") or 0,
            facts.settings[arm].batch_size * facts.config.train.accumulation_steps,
        )
        for arm in facts.arms
    }
    shown = ", ".join(
        f"{arm} {steps:,} steps of {pictures} pictures" for arm, (steps, pictures) in lengths.items()
    )
    if len(set(lengths.values())) <= 1:
        steps, pictures = next(iter(lengths.values()), (0, 0))
        return Condition(name, "yes", f"{steps:,} steps of {pictures} pictures each.")
    batches = {facts.settings[arm].batch_size for arm in facts.arms}
    if len({facts.settings[arm].epochs for arm in facts.arms}) == 1 and len(batches) == len(
        set(lengths.values())
    ):
        return Condition(
            name, "caution", f"Every arm saw the same pictures, but in batches of several sizes: {shown}."
        )
    return Condition(name, "no", f"{shown}.")


def _same_noise(facts: Facts) -> Condition:
    name = "Same prompts and initial noise in the test"
    if facts.scores is None:
        return Condition(name, NOT_MEASURED, "The score stage has not run.")
    rows = [row for row in facts.scores.rows if row.kind == "arm"]
    prompts, seeds = {(row.category, row.prompt_index) for row in rows}, {row.seed for row in rows}
    basis = f"{count(len(prompts), 'prompt')} x {count(len(seeds), 'sampling seed')}"
    return Condition(
        name,
        "yes",
        f"The base and every arm drew the same {basis}, each from the same noise. Scoring refuses a run "
        "where one is missing.",
    )


def _leaks(facts: Facts) -> list[Condition]:
    split, prompts = "No training picture among the held-out ones", "Test prompts are not training captions"
    if facts.data is None:
        return [Condition(name, NOT_MEASURED, "The data stage has not run.") for name in (split, prompts)]
    train, heldout = facts.data["train"], facts.data["heldout"]
    train_ids, heldout_ids = ({example["id"] for example in side} for side in (train, heldout))
    same = {example["digest"] for example in train} & {example["digest"] for example in heldout}
    straddling = [
        group
        for group in facts.data["duplicates"]
        if train_ids & set(group["ids"]) and heldout_ids & set(group["ids"])
    ]
    found = count(len(facts.data["duplicates"]), "group")
    if same or straddling:
        found = f"{count(len(same), 'picture')} and {count(len(straddling), 'group')} of near duplicates"
        text = f"{found} lie on both sides: held-out loss is too low."
        conditions = [Condition(split, "no", text)]
    else:
        text = (
            f"No digest and no group of near duplicates lies on both sides ({len(train)} training, "
            f"{len(heldout)} held-out pictures; {found} of duplicates found in the source and handled)."
        )
        conditions = [Condition(split, "yes", text)]
    asked = {_plain(picture.prompt): picture.prompt for picture in facts.pictures}
    if not asked:
        return [*conditions, Condition(prompts, NOT_MEASURED, "The sample stage has not run.")]
    seen = sorted(asked[key] for key in asked.keys() & {_plain(example["caption"]) for example in train})
    if seen:
        return [
            *conditions,
            Condition(
                prompts,
                "caution",
                f"{len(seen)} of {len(asked)} prompts were trained on word for word, such as “{seen[0]}”.",
            ),
        ]
    return [
        *conditions,
        Condition(prompts, "yes", f"None of the {len(asked)} prompts equals one of the training captions."),
    ]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")


def _training_seeds(facts: Facts) -> Condition:
    name = "Several training seeds"
    counts = Counter(facts.settings[arm].but_seed for arm in facts.arms)
    least = min(counts.values(), default=0)
    if least < 2:
        return Condition(
            name,
            "caution",
            "One training run per setting: the report describes these files, and cannot separate rank "
            "from luck.",
        )
    return Condition(
        name,
        "yes",
        f"At least {least} training runs per setting. Intervals are still over prompts, for each file apart.",
    )


def _same_gain(facts: Facts) -> Condition:
    name = "Same strength of the update"
    gains = {arm: facts.settings[arm].gain for arm in facts.with_rank}
    if len(gains) < 2:
        few = (
            "Only one arm finished."
            if len(facts.arms) < 2
            else "Fewer than two arms that finished have a rank."
        )
        return Condition(name, NOT_MEASURED, few)
    low, high = min(gains, key=lambda arm: gains[arm]), max(gains, key=lambda arm: gains[arm])
    ratio = gains[high] / gains[low]
    has_ratio = any(facts.settings[arm].lr_ratio != 1 for arm in facts.arms)
    product = f"lr x {'lr ratio x ' if has_ratio else ''}scale x √rank"
    told = " that has a rank" if len(gains) < len(facts.arms) else ""
    if ratio <= 1.05:
        return Condition(
            name, "yes", f"Gain matched: yes. {product} is {gains[low]:.2g} for every arm{told}."
        )
    spread = (
        f"goes from {gains[low]:.2g} ({low}) to {gains[high]:.2g} ({high}), {ratio:.2g} times as much: what "
        "looks like rank may be strength"
    )
    if not facts.same_gain:
        return Condition(
            name,
            "caution",
            f"Gain matched: no. {product} {spread}. An arm with `match_gain` would tell them apart.",
        )
    groups = "; ".join(
        f"{facts.settings_in_words(group)} ({gains[group[0]]:.2g})" for group in facts.same_gain
    )
    ranks = {facts.settings[arm].rank for arm in gains}
    is_whole = any({facts.settings[arm].rank for arm in group} == ranks for group in facts.same_gain)
    apart = "; ".join(facts.settings_in_words(group) for group in facts.same_lr)
    return Condition(
        name,
        "yes" if is_whole else "caution",
        f"Gain matched: yes for {groups}; no for others: over all arms {product} {spread}."
        + (f" At equal lr, not at matched gain: {apart}." if apart else ""),
    )


def _merged(facts: Facts) -> Condition:
    name = "Merged weights draw the same pictures"
    if not facts.merges:
        return Condition(name, NOT_MEASURED, "The merge check has not run.")
    bad = [arm for arm, result in facts.merges.items() if not result["ok"]]
    worst = max(facts.merges.values(), key=lambda result: result["relative_error"] / result["tolerance"])
    measured = f"relative difference at most {worst['relative_error']:.1g}, tolerance {worst['tolerance']:g}"
    if bad:
        return Condition(
            name,
            "no",
            f"Merged and unmerged outputs differ for {', '.join(bad)} ({measured}): use the adapter "
            "unmerged.",
        )
    single = [arm for arm in facts.arms if schedule_of(facts.settings[arm]) is None]
    missing = [arm for arm in single if arm not in facts.merges]
    if missing:
        return Condition(
            name,
            "caution",
            f"Checked for {len(facts.merges)} arms ({measured}), not for {', '.join(missing)}.",
        )
    others = [arm for arm in facts.arms if arm not in single]
    told = f" {', '.join(others)}: T-LoRA, which has no merged weights." if others else ""
    return Condition(name, "yes", f"Merged against unmerged: {measured}.{told}")


def _base_quality(facts: Facts) -> Condition:
    name = "The base follows its prompts"
    base, shuffled = facts.summary.get((BASE, ALL)), facts.summary.get((SHUFFLED, ALL))
    if base is None or shuffled is None or base.low is None or shuffled.high is None:
        return Condition(name, NOT_MEASURED, "There are no scores of the base against shuffled prompts.")
    text = (
        f"The base's pictures score {base.mean:.1f} with their own prompts and {shuffled.mean:.1f} with "
        "others'."
    )
    quality = facts.quality if facts.config.base.model == "pocket" else None
    if quality and "base_r1" in quality:
        text += f" The pocket base as shipped: {_retrieval(quality, 'base')}."
    if base.low > shuffled.high:
        return Condition(name, "yes", text)
    return Condition(
        name, "caution", f"{text} The intervals overlap: a low score says little about an arm here."
    )


def _scorer_quality(facts: Facts) -> Condition:
    name = "The scorer tells captions apart"
    real, noise = facts.summary.get((REAL, ALL)), facts.summary.get((NOISE, ALL))
    quality = facts.quality if facts.config.score.model == "pocket" else None
    texts, states = [], []
    if real is not None and noise is not None and real.low is not None and noise.high is not None:
        apart = real.low > noise.high
        overlap = "" if apart else "; the intervals overlap"
        texts.append(
            f"Real held-out pictures score {real.mean:.1f} with their captions, noise "
            f"{noise.mean:.1f}{overlap}."
        )
        states.append(apart)
    if quality and "scorer_r1" in quality:
        texts.append(f"The pocket scorer as shipped: {_retrieval(quality, 'scorer')}.")
        states.append(quality["scorer_r5"] >= 0.5)
    if not states:
        return Condition(name, NOT_MEASURED, "There are no scores of real held-out pictures.")
    return Condition(name, "yes" if all(states) else "caution", " ".join(texts))


def _retrieval(quality: Mapping[str, float], which: str) -> str:
    first, first_five = quality[f"{which}_r1"], quality[f"{which}_r5"]
    return (
        f"the right caption comes first for {first:.0%} of pictures, among the first five for "
        f"{first_five:.0%}"
    )


def _scorer_apart(facts: Facts) -> Condition:
    name = "The scorer is not the base's own text encoder"
    model = facts.config.score.model
    if model == "pocket":
        return Condition(name, "yes", "The pocket scorer was trained apart from the pocket base.")
    if "clip-vit-large-patch14" in model.lower():
        return Condition(
            name,
            "caution",
            f"{model} holds Stable Diffusion 1's own text encoder: base and arms are judged by the "
            "model that steers them.",
        )
    return Condition(name, NOT_MEASURED, f"Whether {model} shares weights with the base is not known.")


def _all_finished(facts: Facts) -> Condition:
    name = "Every planned arm was compared"
    missing = [arm for arm in facts.settings if arm not in facts.arms]
    if not missing:
        return Condition(name, "yes", f"All {len(facts.settings)} arms finished.")
    shown = "; ".join(f"{arm}: {facts.failed.get(arm, 'not trained')}" for arm in missing[:4])
    return Condition(
        name,
        "caution",
        f"{len(missing)} of {len(facts.settings)} arms did not finish ({shown}). Those left may be the "
        "easier settings.",
    )
