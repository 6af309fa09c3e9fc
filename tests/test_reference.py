"""The schema read back: types in words and the table of all keys."""

from typing import Any

from lorascope.arms import ArmGrid
from lorascope.reference import reference_table
from lorascope.schema import StudyConfig
from lorascope.sections import TargetGroup


def test_the_reference_table_has_a_row_for_every_key() -> None:
    rows = reference_table().splitlines()[2:]
    keys = [row.split("`")[1] for row in rows]
    tables = {"arms": ArmGrid, "adapter.groups": TargetGroup}

    def leaves(key: str, kind: Any) -> list[str]:
        fields = getattr(tables.get(key, kind), "model_fields", None)
        return (
            [key]
            if fields is None
            else [leaf for name in fields for leaf in leaves(f"{key}.{name}", fields[name].annotation)]
        )

    expected = [
        leaf for name, field in StudyConfig.model_fields.items() for leaf in leaves(name, field.annotation)
    ]
    assert keys == expected
    assert all(row.count("|") == 5 and not row.endswith("None |") for row in rows)
    assert "| `trackers` | list of `tensorboard` or `wandb` or `mlflow` or `trackio` | `[]` | " in "\n".join(
        rows
    )
    assert "| `train.betas` | list of 2 numbers | `[0.9, 0.999]` | AdamW's decay rates |" in rows
    assert "| `arms.rank` | whole number or list of whole numbers | `16` | rank r of the adapter |" in rows
    assert '| `export.dtype` | `fp32` or `fp16` or `bf16` | `"fp16"` | dtype of those files |' in rows
