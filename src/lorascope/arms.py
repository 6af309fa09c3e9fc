"""The arms of a study: grids of `[[arms]]`, and the arms they make, with their names and learning rates."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lorascope.errors import shown
from lorascope.sections import (
    HIGHEST,
    LOWEST,
    MAX_ARMS,
    BatchSize,
    BatchSizes,
    Dropout,
    Dropouts,
    Epochs,
    Name,
    PositiveReal,
    PositiveReals,
    Rank,
    Ranks,
    Section,
    Seed,
    Seeds,
    SeveralEpochs,
    Targets,
    Text,
    TrainSection,
)

Scaling = Literal["alpha/r", "rslora"]
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "random-svd", "random-svd-square"]
Kind = Literal["lora", "tlora", "dora", "loha", "lokr", "full"]
MaskWhen = Literal["always", "training"]

_DEFAULT_LR = 1e-4
FULL_RANK = 1024  # what full fine-tuning counts as where arms are put in the order of their ranks
# Whose product B S A is not zero at the start, so that it is subtracted; of the latter S is trained apart.
_ANCHORED: tuple[Init, ...] = ("pissa", "random-svd", "random-svd-square")
_WITH_VALUES = _ANCHORED[1:]
_WITHOUT_FACTORS: tuple[Kind, ...] = ("loha", "lokr", "full")  # whose update is no scale x B A


class ArmGrid(Section):
    """One table of `[[arms]]`: every key that takes a number may be a list, and the product of the lists is
    trained.
    """

    name: Name | None = Field(
        default=None,
        description=(
            "name of the arm, only for a table that makes one; made from rank and what varies when absent"
        ),
    )
    kind: Kind = Field(
        default="lora",
        description=(
            "`lora`; `tlora`, of which all components act where there is no noise, and the first `min_rank` "
            "where there is nothing else; `dora`, which learns the size of each row of the weight apart; "
            "`loha`, two products multiplied element by element; `lokr`, a Kronecker product; `full`, all "
            "weights of the U-Net"
        ),
    )
    rank: Rank | Ranks = Field(default=16, description="rank r of the adapter")
    min_rank: Rank | Ranks | None = Field(
        default=None,
        description="of `tlora`: components that act at the last timestep; half the rank when absent",
    )
    mask_exponent: PositiveReal = Field(
        default=1.0,
        description="of `tlora`: a in r(t) = int(((T - t) / T)^a (rank - min_rank)) + min_rank",
    )
    mask_when: MaskWhen = Field(
        default="always",
        description=(
            "of `tlora`: components are left out `always`, in drawing too, as published, or in `training` "
            "alone, which gives files that are LoRA like any other"
        ),
    )
    alpha: PositiveReal | PositiveReals | None = Field(
        default=None,
        description=(
            "alpha; the update is scaled by alpha / rank, or as `scaling` says. Give this or "
            "`alpha_per_rank`; alpha is the rank when both are absent"
        ),
    )
    alpha_per_rank: PositiveReal | PositiveReals | None = Field(
        default=None, description="alpha as a multiple of the rank: the scale alpha / rank itself"
    )
    scaling: Scaling = Field(
        default="alpha/r",
        description="how alpha scales the update: `alpha/r` by alpha / rank, `rslora` by alpha / sqrt(rank)",
    )
    init: Init = Field(
        default="kaiming",
        description=(
            "what A and B start from: `kaiming` draws A from U(-1/sqrt(in), 1/sqrt(in)), `gaussian` from "
            "N(0, 1/rank^2), both with B = 0; `orthogonal` draws both, so that their product is 0; `pissa` "
            "from the leading singular vectors of the weight, `random-svd` and `random-svd-square` from "
            "those of a random matrix, as T-LoRA, and what they started from is subtracted"
        ),
    )
    layers: Targets = Field(
        default=("*",),
        min_length=1,
        description=(
            "of `full`: the U-Net's layers that are trained, norms too, by name endings or patterns as in "
            "`adapter.targets`"
        ),
    )
    match_gain: Text | None = Field(
        default=None,
        description=(
            "name of an arm that has an `lr`; in place of `lr`, which then is such that "
            "lr x lr_ratio x scale x sqrt(rank) is that arm's"
        ),
    )
    lr: PositiveReal | PositiveReals | None = Field(
        default=None,
        validate_default=True,
        description=f"learning rate; {_DEFAULT_LR:g} when this and `match_gain` are absent",
    )
    lr_ratio: PositiveReal | PositiveReals = Field(
        default=1.0,
        description="learning rate of B over that of A, which is `lr`; LoRA+ recommends 16 with a lower lr",
    )
    rank_dropout: Dropout | Dropouts = Field(
        default=0.0,
        description=(
            "share of the components that each picture leaves out in each layer of the U-Net in a training "
            "step; the others are scaled up"
        ),
    )
    max_weight_norm: PositiveReal | PositiveReals | None = Field(
        default=None,
        description=(
            "most that the update of a layer, scale x B A, may measure in l2; a larger one is scaled down "
            "after each step, A and B alike"
        ),
    )
    seed: Seed | Seeds = Field(
        default=0, description="training seed: initial weights, order, noise, timesteps and caption dropout"
    )
    batch_size: BatchSize | BatchSizes | None = Field(
        default=None, description="pictures per step; `train.batch_size` when absent"
    )
    epochs: Epochs | SeveralEpochs | None = Field(
        default=None, description="passes over the training pictures; `train.epochs` when absent"
    )

    @field_validator("alpha_per_rank")
    @classmethod
    def _one_alpha(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("alpha") is not None:
            raise ValueError(f"excludes alpha = {shown(info.data['alpha'])}: give one of the two")
        return value

    @field_validator("lr")
    @classmethod
    def _one_lr(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.data.get("match_gain")
        if value is not None and name is not None:
            raise ValueError(f"excludes match_gain = {shown(name)}: give one of the two")
        return _DEFAULT_LR if value is None and name is None else value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        for key in ("min_rank", "mask_exponent", "mask_when"):
            value = getattr(self, key)
            if self.kind != "tlora" and value != type(self).model_fields[key].default:
                raise ValueError(f'{key} = {shown(value)}: is of T-LoRA: leave it out, or set kind = "tlora"')
        if self.max_weight_norm is not None and (self.kind == "dora" or self.init in _ANCHORED):
            what = "DoRA" if self.kind == "dora" else f"an adapter with init = {self.init!r}"
            raise ValueError(
                f"max_weight_norm = {shown(self.max_weight_norm)}: bounds scale x B A, which is not all that "
                f'{what} changes: leave it out, or set kind = "lora" and another init'
            )
        if self.kind == "dora" and max(_several(self.rank_dropout)):
            raise ValueError(
                f"rank_dropout = {shown(self.rank_dropout)}: would change the norms that DoRA divides by: "
                'leave it out, or set kind = "lora"'
            )
        if self.kind in _WITHOUT_FACTORS:
            self._refuse(("init", "lr_ratio", "rank_dropout", "max_weight_norm"), "is of factors B and A")
        if self.kind == "full":
            keys = ("rank", "alpha", "alpha_per_rank", "scaling", "match_gain")
            self._refuse(keys, "is of a rank, which full fine-tuning does not have")
        elif self.layers != type(self).model_fields["layers"].default:
            raise ValueError(
                f"layers = {shown(list(self.layers))}: is of full fine-tuning: leave it out, or set "
                'kind = "full"; layers that adapters have are adapter.targets'
            )
        if self.min_rank is not None and max(_several(self.min_rank)) > min(_several(self.rank)):
            raise ValueError(
                f"min_rank = {max(_several(self.min_rank))}: must be at most the rank, "
                f"{min(_several(self.rank))}: lower it, or give other ranks a table of their own"
            )
        return self

    def _refuse(self, keys: Sequence[str], why: str) -> None:
        """Raise ValueError where one of these keys is given and not what is meant without it."""
        for key in keys:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise ValueError(
                    f'{key} = {shown(value)}: {why}: leave it out, or set another kind than "{self.kind}"'
                )

    @model_validator(mode="after")
    def _name_of_one(self) -> Self:
        if self.name is not None and (count := self.count()) > 1:
            raise ValueError(
                f"the name {self.name!r} stands on a table that makes {count} arms: leave the name out, "
                "or give single values"
            )
        return self

    def count(self) -> int:
        """How many arms this table makes."""
        scalings = self.alpha_per_rank if self.alpha is None else self.alpha
        values = (self.rank, scalings, *(getattr(self, key) for key in _MULTIPLIED))
        return math.prod(len(_several(value)) for value in values)

    def settings(self) -> list[dict[str, Any]]:
        """Every arm of this table: its choices, alpha as it is given, lr None where it follows from
        `match_gain`, batch size and epochs None where `train`'s hold.
        """
        key = "alpha_per_rank" if self.alpha is None else "alpha"
        ranks = (FULL_RANK,) if self.kind == "full" else _several(self.rank)
        scalings = _several(getattr(self, key) or 1.0)
        return [
            {
                "kind": self.kind,
                "rank": rank,
                "mask_exponent": self.mask_exponent,
                "mask_when": self.mask_when,
                "alpha": value if key == "alpha" else value * rank,
                "scaling": self.scaling,
                "init": self.init,
                "layers": self.layers,
                "match_gain": self.match_gain,
                **others,
            }
            for rank, value in itertools.product(ranks, scalings)
            for others in self._products(*_MULTIPLIED)
        ]

    def _products(self, *keys: str) -> list[dict[str, Any]]:
        return [
            dict(zip(keys, values, strict=True))
            for values in itertools.product(*(_several(getattr(self, key)) for key in keys))
        ]


# What may be a list, besides rank and alpha.
_MULTIPLIED = (
    "min_rank",
    "lr",
    "lr_ratio",
    "rank_dropout",
    "max_weight_norm",
    "seed",
    "batch_size",
    "epochs",
)


class Arm(Section):
    """One adapter to train, with every choice resolved.

    `alpha` is what its files say, so that alpha / rank is the scale in any program: with `rslora` it is
    sqrt(rank) times the alpha of the study file. `match_gain` names the arm whose gain gave `lr`.
    """

    name: str
    rank: int
    alpha: float
    lr: float
    seed: int
    batch_size: int = TrainSection().batch_size
    epochs: int = TrainSection().epochs
    scaling: Scaling = "alpha/r"
    kind: Kind = "lora"
    min_rank: int | None = None
    mask_exponent: float = 1.0
    mask_when: MaskWhen = "always"
    init: Init = "kaiming"
    layers: tuple[str, ...] = ("*",)
    lr_ratio: float = 1.0
    rank_dropout: float = 0.0
    max_weight_norm: float | None = None
    match_gain: str | None = None

    @property
    def scale(self) -> float:
        """alpha / rank, the factor on B A."""
        return self.alpha / self.rank

    @property
    def gain(self) -> float:
        """lr x lr_ratio x scale x sqrt(rank): how strongly the update is driven, on one axis for all arms.

        It is B's learning rate that counts: while B is near zero, moving A moves nothing.
        """
        return self.lr * self.lr_ratio * self.scale * math.sqrt(self.rank)

    @property
    def is_anchored(self) -> bool:
        """Whether the product that its factors start from is subtracted again."""
        return self.init in _ANCHORED

    @property
    def has_values(self) -> bool:
        """Whether singular values are trained between its factors."""
        return self.init in _WITH_VALUES

    @property
    def has_factors(self) -> bool:
        """Whether its update is scale x B A at any one time, without magnitudes."""
        return self.kind in ("lora", "tlora")

    @property
    def family(self) -> str:
        """Arms of one family are computed in one way, and so may lie in one bank; a full fine-tuning is alone
        in its own.
        """
        families = {"loha": "lycoris", "lokr": "lycoris", "full": f"full {self.name}"}
        return families.get(self.kind, "lora")

    @property
    def options(self) -> dict[str, Any]:
        """Its choices that are not the default, by key, but for those of any LoRA: rank, alpha, lr, epochs,
        batch size and seed.
        """
        keys = (
            *("kind", "min_rank", "mask_exponent", "mask_when", "init", "layers"),
            *("lr_ratio", "rank_dropout", "max_weight_norm"),
        )
        fields = type(self).model_fields
        return {key: value for key in keys if (value := getattr(self, key)) != fields[key].default}

    @property
    def manner(self) -> tuple[Any, ...]:
        """What arms have in common that differ in rank and in how strongly they are driven alone: their
        options, of T-LoRA the least rank as a share.
        """
        share = None if self.min_rank is None else self.min_rank / self.rank
        return share, *sorted(item for item in self.options.items() if item[0] != "min_rank")

    @property
    def but_seed(self) -> str:
        """All choices that change its training but the seed, as text: what the seeds of a setting share."""
        return self.model_dump_json(exclude={"name", "seed", "match_gain"})


def alpha_in_files(alpha: float, rank: int, scaling: Scaling) -> float:
    """The alpha for which alpha / rank is the scale: `alpha` itself, and with `rslora`, whose scale is
    alpha / sqrt(rank) (Kalajdzievski 2023), sqrt(rank) times as much.
    """
    return alpha * math.sqrt(rank) if scaling == "rslora" else alpha


def require_distinct(grids: Sequence[ArmGrid], train: TrainSection) -> None:
    """Raise ValueError where the grids make more than `MAX_ARMS` arms, two of one name or of the same
    choices, or one that is called as the unadapted model.
    """
    if (num_arms := sum(grid.count() for grid in grids)) > MAX_ARMS:
        raise ValueError(f"make {num_arms:,} arms: at most {MAX_ARMS:,}: leave values out")
    seen: dict[Any, Arm] = {}
    for arm in expand(grids, train):
        folder = arm.name.casefold()  # some file systems do not tell r16 from R16
        if folder == "base":
            raise ValueError(
                f"an arm is called {arm.name!r}, which is kept for the unadapted model: choose another name"
            )
        if other := seen.get(folder):
            same = (
                "two arms are called"
                if other.name == arm.name
                else f"arm names differ only in case: {other.name!r} and"
            )
            raise ValueError(
                f"{same} {arm.name!r}: give them names of their own, or vary rank, alpha, lr, seed, "
                "batch_size or epochs"
            )
        choices = arm.model_dump_json(exclude={"name", "scaling", "match_gain"})
        if other := seen.get(choices):
            raise ValueError(f"arms {other.name!r} and {arm.name!r} have the same choices: leave one out")
        seen[folder] = seen[choices] = arm


def expand(grids: Sequence[ArmGrid], train: TrainSection) -> tuple[Arm, ...]:
    """All arms in the order of the file, each table's lists multiplied out.

    An arm without a name is called `r<rank>`, followed by the choices in which arms of one rank differ:
    `r16`, `r16-s1`, `r16-a32-lr0.0005-b8-e20-s1`. In place of its lr an arm of another's gain has the other's
    name: `r64-gain-r16-s1`.
    """
    places, names, settings = [], [], []
    for index, grid in enumerate(grids):
        for setting in grid.settings():
            places.append(f"arms.{index}.match_gain")
            names.append(grid.name)
            settings.append(_resolve(setting, train))
    varying = _varying(settings)
    # The arms whose lr follows from another's get it last: until then it is 0.
    arms = [
        Arm(
            **{
                **setting,
                "name": name or _default_name(setting, varying),
                "alpha": alpha_in_files(setting["alpha"], setting["rank"], setting["scaling"]),
                "lr": setting["lr"] or 0.0,
            }
        )
        for name, setting in zip(names, settings, strict=True)
    ]
    return _with_matched_gains(places, arms)


def _resolve(setting: Mapping[str, Any], train: TrainSection) -> dict[str, Any]:
    """A setting of an arm with `train`'s batch size and epochs, and T-LoRA's usual least rank, where it has
    none of its own.
    """
    shared = {key: getattr(train, key) for key in ("batch_size", "epochs") if setting[key] is None}
    if setting["kind"] == "tlora" and setting["min_rank"] is None:
        shared["min_rank"] = max(1, setting["rank"] // 2)
    return {**setting, **shared}


def _varying(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """The keys in which settings of one rank differ."""
    by_rank: dict[int, list[Mapping[str, Any]]] = {}
    for setting in settings:
        by_rank.setdefault(setting["rank"], []).append(setting)
    keys = ("kind", "mask_exponent", "mask_when", "alpha", "scaling", "init", "layers", *_MULTIPLIED)
    return {
        key
        for key in keys
        for group in by_rank.values()
        if len({setting[key] for setting in group} - ({None} if key in ("lr", "min_rank") else set())) > 1
    }


def _default_name(setting: Mapping[str, Any], varying: set[str]) -> str:
    parts = [f"r{setting['rank']}"]
    if setting["kind"] == "full":
        parts = ["full"]
    elif "kind" in varying and setting["kind"] != "lora":
        parts.append(setting["kind"])
    if setting["kind"] == "tlora":
        parts += [f"min{setting['min_rank']}"] if "min_rank" in varying else []
        parts += [f"exp{setting['mask_exponent']:g}"] if "mask_exponent" in varying else []
        parts += ["masked-training"] if "mask_when" in varying and setting["mask_when"] == "training" else []
    if "alpha" in varying:
        parts.append(f"a{setting['alpha']:g}")
    if "scaling" in varying and setting["scaling"] == "rslora":
        parts.append("rslora")
    if "init" in varying and setting["init"] != "kaiming":
        parts.append(setting["init"])
    if setting["match_gain"] is not None:
        parts.append(f"gain-{setting['match_gain']}")
    elif "lr" in varying:
        parts.append(f"lr{setting['lr']:g}")
    if "lr_ratio" in varying and setting["lr_ratio"] != 1:
        parts.append(f"ratio{setting['lr_ratio']:g}")
    if "rank_dropout" in varying and setting["rank_dropout"]:
        parts.append(f"dropout{setting['rank_dropout']:g}")
    if "max_weight_norm" in varying and setting["max_weight_norm"] is not None:
        parts.append(f"norm{setting['max_weight_norm']:g}")
    parts += [
        f"{letter}{setting[key]}"
        for key, letter in (("batch_size", "b"), ("epochs", "e"), ("seed", "s"))
        if key in varying
    ]
    return "-".join(parts).replace("+", "")  # 1e+06: a plus has no place in a folder's name


def _with_matched_gains(places: Sequence[str], arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """The arms, those of another's gain at the lr that gives it; `places` are the keys of their tables."""
    one_of_each_table = dict(zip(places, arms, strict=True))
    references = {
        place: _reference(place, arm, arms)
        for place, arm in one_of_each_table.items()
        if arm.match_gain is not None
    }
    return tuple(
        arm if arm.match_gain is None else _with_gain_of(references[place], arm, place)
        for place, arm in zip(places, arms, strict=True)
    )


def _reference(place: str, arm: Arm, arms: Sequence[Arm]) -> Arm:
    """The arm whose gain `arm` is to have: of that name, or any whose name begins with it where all of those
    with an lr of their own have one gain.
    """
    wanted = arm.match_gain
    given = f"{place} = {shown(wanted)}"
    own = [other for other in arms if other.match_gain is None]
    longer = [other for other in arms if other.name.startswith(f"{wanted}-")]
    named = (
        [other for other in arms if other.name == wanted]
        or [other for other in longer if other.match_gain is None]
        or longer
    )
    if not named:
        remedy = f"name {_listed(own, 'or')}" if own else "give one arm an lr, and its name here"
        raise ValueError(f"{given}: no arm with an lr of its own is called that: {remedy}")
    if named[0] == arm:
        raise ValueError(f"{given}: is this arm itself: name another, which has an lr of its own")
    if named[0].match_gain is not None:
        raise ValueError(
            f"{given}: has no lr of its own, but the gain of {shown(named[0].match_gain)}: name an arm that "
            "has an lr, or give that one an lr"
        )
    if len({other.gain for other in named}) > 1 and named[0].name != wanted:
        raise ValueError(
            f"{given}: fits {_listed(named)}, which differ in their gain: give one of these names"
        )
    return named[0]


def _with_gain_of(reference: Arm, arm: Arm, place: str) -> Arm:
    """The arm at the lr that gives it the reference's gain."""
    ratios = reference.lr_ratio / arm.lr_ratio * (reference.scale / arm.scale)
    lr = reference.lr * ratios * math.sqrt(reference.rank / arm.rank)
    if not LOWEST <= lr <= HIGHEST:
        raise ValueError(
            f"{place} = {shown(arm.match_gain)}: needs lr = {lr:g} for {arm.name!r}, which must be from "
            f"{LOWEST:g} to {HIGHEST:g}: choose an alpha nearer to that arm's"
        )
    return arm.model_copy(update={"lr": lr})


def _listed(arms: Sequence[Arm], word: str = "and") -> str:
    """The names of the first few of these arms, in words."""
    *names, last = [repr(arm.name) for arm in arms[:4]]
    if len(arms) > 4:
        names, last = [*names, last], f"{len(arms) - 4:,} more"
    return f"{', '.join(names)} {word} {last}" if names else last


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
