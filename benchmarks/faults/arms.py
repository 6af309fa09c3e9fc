"""Which faults are planted: arms of studies on the pocket base, each with the cause that it should be given.

The doses rest on one training seed of them on the shipped pocket base (450 steps of batch 4, alpha = 2 x
rank). Rank 16 kept 98 % of the base's prompt fidelity at a learning rate of 2e-5 and 74 % at 5e-5, rank 4
96 % at 5e-5 and 74 % at 1e-4, rank 64 100 % at 1e-5 and 84 % at 2e-5: what counts as healthy by the rule, at
most 10 % lost, has to be weaker than the second of each. A mild dose of a fault is one near its border.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorascope.arms import Arm
from lorascope.arms import Kind as AdapterKind
from lorascope.diagnosis.words import Cause
from lorascope.schema import StudyConfig

Kind = Literal["mild", "gross", "few", "scrambled", "other", "other-few"]
KINDS: tuple[Kind, ...] = ("mild", "gross", "few", "scrambled", "other", "other-few")
_OF_FEW: tuple[Kind, ...] = ("few", "other-few")
# Whether little style was gained, and prompts were kept by a narrow margin, takes more drawings to see.
_OF_LITTLE: tuple[Kind, ...] = ("mild", "other")
_RESOLUTION_PX = 64
# With it the second step is beyond float32: the update is that of the first step to the power of two.
_BEYOND_NUMBERS = 1e15


@dataclass(frozen=True)
class Fault:
    """An arm with a fault, or without one. `label` is the cause that it should be given.

    `kind` is the study that it is an arm of; `quick` says whether the quick run has it.
    """

    name: str
    label: Cause
    kind: Kind
    rank: int
    lr: float
    alpha_per_rank: float = 2.0
    epochs: int | None = None
    batch_size: int | None = None
    quick: bool = False
    adapter: AdapterKind = "lora"

    def grid(self, seed: int) -> dict[str, Any]:
        """The fault as a table of `[[arms]]`."""
        optional = {"epochs": self.epochs, "batch_size": self.batch_size}
        return {
            "name": self.name,
            "kind": self.adapter,
            "rank": self.rank,
            "alpha_per_rank": self.alpha_per_rank,
            "lr": self.lr,
            "seed": seed,
            **{key: value for key, value in optional.items() if value is not None},
        }


_OTHER_ADAPTERS: tuple[AdapterKind, ...] = ("tlora", "dora")
_DOSES: tuple[tuple[str, Cause, float], ...] = (
    ("healthy", "healthy", 2e-5),
    ("strong", "too_strong", 3e-4),
    ("diverged", "diverged", 5e-3),
    ("little", "not_learned", 1e-6),
)
FAULTS = (
    Fault("healthy-r4-lr3e-5", "healthy", "mild", 4, 3e-5),
    Fault("healthy-r16-lr1.5e-5", "healthy", "mild", 16, 1.5e-5),
    Fault("healthy-r16-lr2e-5", "healthy", "mild", 16, 2e-5, quick=True),
    Fault("healthy-r64-lr1e-5", "healthy", "mild", 64, 1e-5),
    Fault("strong-r4-lr1e-4", "too_strong", "mild", 4, 1e-4),
    Fault("strong-r16-lr5e-5", "too_strong", "mild", 16, 5e-5, quick=True),
    Fault("strong-r16-lr3e-4", "too_strong", "gross", 16, 3e-4),
    Fault("strong-r64-lr2e-4", "too_strong", "gross", 64, 2e-4),
    Fault("strong-r16-lr1.4e-3", "too_strong", "gross", 16, 1.4e-3, quick=True),
    Fault("strong-r16-alpha-x4", "too_strong", "gross", 16, 3e-4, alpha_per_rank=8.0),
    Fault("diverged-r64-lr2e-3", "diverged", "gross", 64, 2e-3),
    Fault("diverged-r64-lr4e-3", "diverged", "gross", 64, 4e-3, quick=True),
    Fault("diverged-r16-lr5e-3", "diverged", "gross", 16, 5e-3),
    Fault("little-r16-lr1e-6", "not_learned", "mild", 16, 1e-6, quick=True),
    Fault("little-r64-lr1e-6", "not_learned", "mild", 64, 1e-6),
    # Batches of 60 make 10 steps of an epoch of 600.
    Fault("little-r16-10-steps", "not_learned", "mild", 16, 2e-4, epochs=1, batch_size=60),
    Fault("not-finite-r16", "numerical", "gross", 16, _BEYOND_NUMBERS, quick=True),
    Fault("overfit-r16", "overfit", "few", 16, 5e-4, quick=True),
    Fault("overfit-r64", "overfit", "few", 64, 5e-4),
    Fault("overfit-r16-longer", "overfit", "few", 16, 5e-4, epochs=20),
    Fault("drift-r16-lr2e-4", "unconditional_drift", "scrambled", 16, 2e-4),
    Fault("drift-r16-lr5e-4", "unconditional_drift", "scrambled", 16, 5e-4, quick=True),
    Fault("drift-r64-lr2e-4", "unconditional_drift", "scrambled", 64, 2e-4),
    # The same of other kinds of adapter, whose thresholds are those of LoRA: they are judged, never learnt.
    *(
        Fault(f"{word}-{adapter}-lr{lr:g}", label, "other", 16, lr, adapter=adapter)
        for adapter in _OTHER_ADAPTERS
        for word, label, lr in _DOSES
    ),
    *(
        Fault(f"overfit-{adapter}", "overfit", "other-few", 16, 5e-4, adapter=adapter)
        for adapter in _OTHER_ADAPTERS
    ),
)
BY_NAME = {fault.name: fault for fault in FAULTS}
# Faults are planted into the files of the first of these arms, and the second gives the weights that are
# taken for it: both have its rank and alpha.
FILE_ARM, FILE_DONOR = "healthy-r16-lr2e-5", "strong-r16-lr5e-5"


@dataclass(frozen=True)
class Planned:
    """One study: the faults of one kind under one seed. `name` is that of its run folder."""

    kind: Kind
    seed: int
    faults: tuple[Fault, ...]
    config: StudyConfig

    @property
    def name(self) -> str:
        """Kind and seed."""
        return f"{self.kind}-s{self.seed}"

    @property
    def num_forwards(self) -> int:
        """Passes of one picture through the U-Net that the study takes, roughly."""
        config = self.config
        section, train = config.diagnose, config.train
        num_train = (config.data.num_train or 0) * config.data.repeats
        num_heldout = config.data.num_heldout or 0
        num_prompts = 2 * (section.num_prompts or 0) * len(section.seeds)
        num_tried = 2 * min(section.num_prompts, section.num_intervention_prompts) * len(section.seeds)
        drawing = section.steps * 2  # guidance takes two passes a step
        lowest = min(arm.rank for arm in config.expand_arms())

        def of_arm(arm: Arm) -> int:
            training = round(_TRAINING_FORWARDS * arm.epochs * num_train * _scrambled_factor(self.kind))
            probing = arm.epochs * train.num_probe * 2 * _PROBES
            # The base's unconditional branch, scaled intruders, and the cut of arms above the lowest rank.
            num_interventions = 1 + section.scale_intruders + (section.cut_rank and arm.rank > lowest)
            sweep = (len(section.strengths) * num_prompts + num_interventions * num_tried) * drawing
            losses = (2 * min(num_heldout, 100) + 16) * _PROBES
            return training + probing + sweep + losses + 2 * config.sample.steps * 2

        of_base = num_prompts * drawing + (2 * num_heldout + 16) * _PROBES
        return of_base + sum(of_arm(arm) for arm in config.expand_arms())


_TRAINING_FORWARDS = 2.17  # a training step over a forward pass, as counted on SD v1.5
_PROBES = 8  # four timesteps, with caption and without
SCRAMBLED_SHARE = 0.5  # scrambled pictures for each sound one


def _scrambled_factor(kind: Kind) -> float:
    return 1 + SCRAMBLED_SHARE if kind == "scrambled" else 1


@dataclass(frozen=True)
class Size:
    """How much is trained and drawn."""

    num_train: int
    num_heldout: int
    epochs: int
    num_few: int  # pictures of the overfit arms, each seen ten times an epoch
    few_epochs: int
    num_probe: int
    num_prompts: int  # of each category
    num_tried: int  # of these, for interventions
    steps: int
    strengths: tuple[float, ...]
    num_drawings: int  # sampling seeds of the kinds in `_OF_LITTLE`; 1 of the others


FULL = Size(600, 64, 3, 16, 12, 16, 20, 20, 10, (0.25, 0.5, 1.0), 4)
QUICK = Size(100, 20, 4, 12, 3, 4, 7, 4, 7, (0.5, 1.0), 1)
FULL_SEEDS, QUICK_SEEDS = 8, 3
_OTHER_SEEDS = 2  # training seeds of other kinds of adapter, which are judged alone


def plan_studies(num_seeds: int, quick: bool = False) -> list[Planned]:
    """All studies, by seed and kind; a study with many arms trains several in one pass."""
    return [planned for seed in range(num_seeds) for planned in _of_seed(seed, quick)]


def _of_seed(seed: int, quick: bool) -> Iterator[Planned]:
    for kind in KINDS:
        faults = tuple(fault for fault in FAULTS if fault.kind == kind and (fault.quick or not quick))
        if faults and (seed < _OTHER_SEEDS or not kind.startswith("other")):
            size = QUICK if quick else FULL
            yield Planned(kind, seed, faults, study_config(f"{kind}-s{seed}", kind, seed, faults, size))


def study_config(name: str, kind: Kind, seed: int, faults: Sequence[Fault], size: Size) -> StudyConfig:
    """A study of these faults. Its pictures are drawn with the training seed too: no two seeds share them."""
    few = kind in _OF_FEW
    # The first is the training seed, so that no two share the noise of a drawing.
    drawings = [seed + 100 * place for place in range(size.num_drawings if kind in _OF_LITTLE else 1)]
    return StudyConfig.model_validate(
        {
            "name": name,
            # Workers would open the study by its file, which says nothing of scrambled pictures.
            **({"workers": 1} if kind == "scrambled" else {}),
            "base": {"model": "pocket"},
            "data": {
                "source": "pocket",
                "resolution_px": _RESOLUTION_PX,
                "num_train": size.num_few if few else size.num_train,
                "num_heldout": size.num_heldout,
                "repeats": 10 if few else 1,  # epochs are probed: fewer of them cost less
            },
            "arms": [fault.grid(seed) for fault in faults],
            "train": {
                "epochs": size.few_epochs if few else size.epochs,
                "batch_size": 4,
                "num_probe": size.num_probe,
            },
            "sample": {"num_prompts": size.num_prompts, "steps": size.steps, "seeds": drawings},
            "diagnose": {
                "strengths": list(size.strengths),
                "num_prompts": size.num_prompts,
                "num_intervention_prompts": size.num_tried,
                "scale_intruders": False,  # these two decide nothing
                "cut_rank": False,
                "seeds": drawings,
                "steps": size.steps,
                "guidances": [],
            },
        }
    )
