"""A study as data: all its tables as one frozen Pydantic model, as a TOML file, as a digest."""

from typing import Literal, Self

import tomli_w
from pydantic import Field, model_validator

from lorascope.arms import Arm, ArmGrid, expand, require_distinct
from lorascope.sections import (
    AdapterSection,
    ArmCount,
    BaseSection,
    DataSection,
    DiagnoseSection,
    ExportSection,
    Name,
    SampleSection,
    ScoreSection,
    Section,
    TrainSection,
    VerdictSection,
)
from lorascope.store import digest_json

# Keys that came after there were run folders: digests leave them out at their defaults, or those folders
# would train again.
_LATER_KEYS = (
    ("data", "folder_repeats"),
    ("score", "style_model"),
    ("arms", "scaling"),
    ("arms", "match_gain"),
    ("arms", "init"),
    ("arms", "lr_ratio"),
    ("arms", "max_weight_norm"),
    ("arms", "kind"),
    ("arms", "min_rank"),
    ("arms", "mask_exponent"),
    ("arms", "mask_when"),
    ("arms", "layers"),
    ("arms", "rank_dropout"),
    ("diagnose", "num_intervention_prompts"),
    ("diagnose", "scale_intruders"),
    ("diagnose", "cut_rank"),
)


class StudyConfig(Section):
    """A whole study."""

    name: Name = Field(default="study", description="name of the study; the run folder is `runs/<name>`")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="`auto` takes the GPU if there is one; `mps` is that of a Mac, in fp32"
    )
    workers: ArmCount | None = Field(
        default=None,
        description=(
            "groups of arms trained side by side; one a GPU, or on a CPU one a core and two arms, when absent"
        ),
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(),
        description="send losses, learning rates and previews to these too; each needs its package",
    )
    base: BaseSection = BaseSection()
    data: DataSection = DataSection()
    adapter: AdapterSection = AdapterSection()
    arms: tuple[ArmGrid, ...] = Field(
        default=(ArmGrid(rank=(16, 64), alpha_per_rank=2.0, lr=5e-4),),
        min_length=1,
        description="the adapters to compare",
    )
    train: TrainSection = TrainSection()
    sample: SampleSection = SampleSection()
    score: ScoreSection = ScoreSection()
    diagnose: DiagnoseSection = DiagnoseSection()
    verdict: VerdictSection = VerdictSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="after")
    def _distinct_arms(self) -> Self:
        require_distinct(self.arms, self.train)
        return self

    def expand_arms(self) -> tuple[Arm, ...]:
        """All arms in the order of the file, as `arms.expand` makes and names them."""
        return expand(self.arms, self.train)

    def to_toml(self) -> str:
        """The study as a TOML file with every key, absent ones left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def digest(self, *sections: str) -> str:
        """SHA-256 over the named sections, or over everything that can change a result when none is named."""
        values = self.model_dump(mode="json")
        for section, key in _LATER_KEYS:
            is_table = isinstance(values[section], dict)
            tables = [values[section]] if is_table else values[section]
            kind = type(getattr(self, section) if is_table else getattr(self, section)[0])
            default = kind.model_fields[key].default
            default = list(default) if isinstance(default, tuple) else default  # as JSON has it
            for table in tables:
                if table[key] == default:
                    del table[key]
        return digest_json({key: values[key] for key in (sections or values) if key != "name"})
