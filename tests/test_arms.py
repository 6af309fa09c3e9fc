"""The arms of a study: grids multiplied out, names, matched gains, and what is refused."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from lorascope.arms import Arm, ArmGrid
from lorascope.schema import StudyConfig
from lorascope.sections import TrainSection
from studies import grids, refusal, study


def arms_of(*grids: ArmGrid) -> tuple[Arm, ...]:
    return StudyConfig(arms=grids).expand_arms()


def test_a_grid_is_the_product_of_its_lists_in_order() -> None:
    arms = arms_of(ArmGrid(rank=(4, 8), alpha=16.0, lr=(1e-4, 5e-4)))
    assert [(arm.name, arm.rank, arm.alpha, arm.lr, arm.seed) for arm in arms] == [
        ("r4-lr0.0001", 4, 16.0, 1e-4, 0),
        ("r4-lr0.0005", 4, 16.0, 5e-4, 0),
        ("r8-lr0.0001", 8, 16.0, 1e-4, 0),
        ("r8-lr0.0005", 8, 16.0, 5e-4, 0),
    ]
    assert arms[0].scale == 4.0


def test_alpha_per_rank_is_the_scale_and_alpha_defaults_to_the_rank() -> None:
    assert [(arm.alpha, arm.scale) for arm in arms_of(ArmGrid(rank=(4, 8), alpha_per_rank=2.0))] == [
        (8.0, 2.0),
        (16.0, 2.0),
    ]
    assert [(arm.name, arm.alpha) for arm in arms_of(ArmGrid(rank=(4, 8)))] == [("r4", 4.0), ("r8", 8.0)]


def test_names_say_what_varies_within_a_rank() -> None:
    assert [arm.name for arm in arms_of(ArmGrid(rank=(4, 8), seed=(0, 12345678)))] == [
        "r4-s0",
        "r4-s12345678",
        "r8-s0",
        "r8-s12345678",
    ]
    assert [arm.name for arm in arms_of(ArmGrid(rank=4, alpha=(1.0, 2.5), lr=(1e-5, 1e-4), seed=(0, 1)))][
        -1
    ] == "r4-a2.5-lr0.0001-s1"
    assert [arm.name for arm in arms_of(ArmGrid(rank=4), ArmGrid(rank=4, lr=1e-5))] == [
        "r4-lr0.0001",
        "r4-lr1e-05",
    ]
    assert [arm.name for arm in arms_of(ArmGrid(rank=4, lr=1e-5), ArmGrid(rank=8, lr=1e-4))] == ["r4", "r8"]
    assert [arm.name for arm in arms_of(ArmGrid(rank=4, alpha=(1e7, 1.0)))] == ["r4-a1e07", "r4-a1"]
    assert [arm.name for arm in arms_of(ArmGrid(name="small", rank=4), ArmGrid(rank=8))] == ["small", "r8"]


def test_batch_size_and_epochs_are_trains_unless_an_arm_has_its_own() -> None:
    config = StudyConfig(
        arms=(ArmGrid(rank=4, batch_size=(4, 8)), ArmGrid(rank=8, epochs=20, seed=(0, 1)), ArmGrid(rank=16))
    )
    assert [(arm.name, arm.batch_size, arm.epochs) for arm in config.expand_arms()] == [
        ("r4-b4-s0", 4, 10),
        ("r4-b8-s0", 8, 10),
        ("r8-b4-s0", 4, 20),
        ("r8-b4-s1", 4, 20),
        ("r16-b4-s0", 4, 10),
    ]
    both = StudyConfig(
        arms=(ArmGrid(rank=4), ArmGrid(rank=4, epochs=2)), train=TrainSection(epochs=3, batch_size=1)
    )
    assert [(arm.name, arm.batch_size, arm.epochs) for arm in both.expand_arms()] == [
        ("r4-e3", 1, 3),
        ("r4-e2", 1, 2),
    ]
    assert "arms.0.batch_size = 0: must be at least 1" in refusal("arms=[{batch_size=0}]")


def test_an_arm_of_anothers_gain_has_the_lr_that_gives_it() -> None:
    arms = arms_of(
        ArmGrid(rank=16, alpha_per_rank=2.0, lr=1.4e-3, seed=(0, 1)),
        ArmGrid(rank=(4, 64), alpha_per_rank=2.0, match_gain="r16", seed=(0, 1)),
        ArmGrid(rank=64, alpha=16.0, match_gain="r16-a32-s1"),
    )
    assert [(arm.name, arm.lr) for arm in arms] == [
        ("r16-a32-s0", 1.4e-3),
        ("r16-a32-s1", 1.4e-3),
        ("r4-a8-gain-r16-s0", 2.8e-3),
        ("r4-a8-gain-r16-s1", 2.8e-3),
        ("r64-a128-gain-r16-s0", 7e-4),
        ("r64-a128-gain-r16-s1", 7e-4),
        ("r64-a16-gain-r16-a32-s1-s0", 5.6e-3),
    ]
    assert {arm.gain for arm in arms} == {1.4e-3 * 2 * 4}
    arm = study('arms=[{rank=16, lr=1e-3}, {rank=64, lr=1e-3}, {rank=64, match_gain="r16"}]').expand_arms()[2]
    assert (arm.name, arm.lr, arm.match_gain) == ("r64-gain-r16", 5e-4, "r16")


def test_rslora_divides_alpha_by_the_root_of_the_rank() -> None:
    arms = arms_of(
        ArmGrid(rank=8, alpha=4.0),
        ArmGrid(rank=8, alpha=4.0, scaling="rslora", lr=1e-3),
        ArmGrid(rank=16, alpha=4.0, scaling="rslora", match_gain="r8-rslora"),
    )
    assert [(arm.name, arm.scale) for arm in arms] == [
        ("r8-lr0.0001", 0.5),
        ("r8-rslora-lr0.001", pytest.approx(4 / 8**0.5)),
        ("r16-rslora-gain-r8-rslora", 1),
    ]
    assert arms[2].gain == pytest.approx(arms[1].gain)


def test_a_start_and_a_ratio_of_rates_make_arms_of_their_own() -> None:
    arms = arms_of(
        ArmGrid(rank=8, lr_ratio=(1.0, 16.0)),
        ArmGrid(rank=8, init="orthogonal"),
        ArmGrid(rank=8, lr_ratio=16.0, max_weight_norm=0.5),
        ArmGrid(rank=32, lr_ratio=4.0, match_gain="r8-ratio16"),
    )
    assert [arm.name for arm in arms] == [
        "r8",
        "r8-ratio16",
        "r8-orthogonal",
        "r8-ratio16-norm0.5",
        "r32-gain-r8-ratio16-ratio4",
    ]
    assert arms[1].gain == pytest.approx(16 * arms[0].gain)
    assert arms[4].gain == pytest.approx(arms[1].gain) and arms[4].lr == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (
            "[{rank=4}, {rank=4}]",
            (
                "two arms are called 'r4': give them names of their own, or vary rank, alpha, lr, seed, "
                "batch_size or epochs"
            ),
        ),
        ("[{rank=4, min_rank=2}]", 'arms.0: min_rank = 2: is of T-LoRA: leave it out, or set kind = "tlora"'),
        ('[{rank=4, mask_when="training", kind="dora"}]', 'arms.0: mask_when = "training": is of T-LoRA'),
        (
            '[{rank=[4, 8], min_rank=6, kind="tlora"}]',
            "arms.0: min_rank = 6: must be at most the rank, 4: lower it",
        ),
        (
            '[{kind="dora", max_weight_norm=1}]',
            "arms.0: max_weight_norm = 1.0: bounds scale x B A, which is not all",
        ),
        ('[{name="a", rank=4}, {name="A", rank=8}]', "arm names differ only in case: 'a' and 'A'"),
        (
            '[{name="a", rank=4, epochs=10}, {name="b", rank=4, alpha=4, epochs=10}]',
            "arms 'a' and 'b' have the same choices: leave one out",
        ),
        (
            '[{name="base"}]',
            "an arm is called 'base', which is kept for the unadapted model: choose another name",
        ),
        (
            '[{name="Base"}]',
            "an arm is called 'Base', which is kept for the unadapted model: choose another name",
        ),
        (
            '[{name="a", rank=[4, 8]}]',
            (
                "arms.0: the name 'a' stands on a table that makes 2 arms: leave the name out, or give "
                "single values"
            ),
        ),
        (
            '[{name="a/b"}]',
            (
                "arms.0.name = \"a/b\": must be 1 to 64 letters, digits, '.', '_' and '-', the first a "
                "letter or digit"
            ),
        ),
        (
            "[{rank=[4, 4]}]",
            "arms.0.rank = [4, 4]: must not repeat a value, but 4 stands there more than once",
        ),
        (
            "[{lr=[1e-4, 0.0001]}]",
            "arms.0.lr = [0.0001, 0.0001]: must not repeat a value, but 0.0001 stands there more than once",
        ),
        (
            '[{rank=16}, {rank=4, lr=1e-3}, {rank=64, match_gain="r15"}]',
            ("arms.2.match_gain = \"r15\": no arm with an lr of its own is called that: name 'r16' or 'r4'"),
        ),
        (
            '[{rank=64, match_gain="r16"}]',
            (
                'arms.0.match_gain = "r16": no arm with an lr of its own is called that: give one arm an lr, '
                "and its name here"
            ),
        ),
        (
            '[{rank=16, lr=[1e-3, 2e-3, 3e-3, 4e-3, 5e-3]}, {rank=64, match_gain="r16"}]',
            (
                "arms.1.match_gain = \"r16\": fits 'r16-lr0.001', 'r16-lr0.002', 'r16-lr0.003', "
                "'r16-lr0.004' and 1 more, which differ in their gain: give one of these names"
            ),
        ),
        (
            '[{name="a", match_gain="a"}]',
            'arms.0.match_gain = "a": is this arm itself: name another, which has an lr of its own',
        ),
        (
            '[{name="a", match_gain="b"}, {name="b", rank=4, match_gain="a"}]',
            (
                'arms.0.match_gain = "b": has no lr of its own, but the gain of "a": name an arm that has an '
                "lr, or give that one an lr"
            ),
        ),
        (
            '[{rank=16}, {rank=64, match_gain="r16", seed=[0, 1]}, {rank=4, match_gain="r64"}]',
            'arms.2.match_gain = "r64": has no lr of its own, but the gain of "r16": name an arm',
        ),
        (
            '[{rank=16, alpha=1e20}, {rank=64, alpha=1e-12, match_gain="r16"}]',
            (
                "arms.1.match_gain = \"r16\": needs lr = 2e+28 for 'r64-gain-r16', which must be from "
                "1e-12 to 1e+20: choose an alpha nearer to that arm's"
            ),
        ),
        (
            '[{rank=16}, {rank=64, match_gain="r16", lr=[1e-3, 1e-4]}]',
            'arms.1.lr = [0.001, 0.0001]: excludes match_gain = "r16": give one of the two',
        ),
        (
            '[{scaling="rslore"}]',
            "arms.0.scaling = \"rslore\": must be one of alpha/r, rslora - did you mean 'rslora'?",
        ),
        ("[]", "arms = []: must be a list with at least one item"),
        ("3", "arms = 3: must be a list of tables"),
        ("[3]", "arms.0 = 3: must be a table"),
    ],
)
def test_arms_that_cannot_be_told_apart_or_stored_are_refused(arms: str, message: str) -> None:
    assert refusal(f"arms={arms}").startswith(f"--set: {message}")


def test_more_arms_than_anyone_trains_are_refused_before_they_are_multiplied_out() -> None:
    ranks, seeds = list(range(1, 1001)), list(range(100_000))
    assert refusal(f"arms=[{{rank={ranks}, seed={seeds}, lr=[1e-3, 1e-4]}}]") == (
        "--set: make 200,000,000 arms: at most 1,024: leave values out"
    )
    assert len(study(f"arms=[{{rank={ranks}}}]").expand_arms()) == 1000


@given(arms=st.lists(grids(), min_size=1, max_size=3))
def test_arm_names_are_distinct_folder_names(arms: list[ArmGrid]) -> None:
    try:
        expanded = StudyConfig(arms=tuple(arms)).expand_arms()
    except ValidationError:
        assume(False)
    folders = [arm.name.casefold() for arm in expanded]
    assert len(set(folders)) == len(folders)
    assert all(ArmGrid(name=arm.name).name == arm.name for arm in expanded)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (
            '{kind="full", rank=8}',
            "rank = 8: is of a rank, which full fine-tuning does not have: leave it out",
        ),
        ('{kind="full", alpha_per_rank=2}', "alpha_per_rank = 2.0: is of a rank"),
        ('{kind="full", scaling="rslora"}', 'scaling = "rslora": is of a rank'),
        (
            '{kind="loha", init="gaussian"}',
            'init = "gaussian": is of factors B and A: leave it out',
        ),
        ('{kind="lokr", lr_ratio=16}', "lr_ratio = 16.0: is of factors B and A"),
        ('{kind="full", max_weight_norm=1}', "max_weight_norm = 1.0: is of factors B and A"),
        ('{init="pissa", max_weight_norm=1}', "is not all that an adapter with init = 'pissa' changes"),
        (
            '{kind="dora", rank_dropout=0.1}',
            "rank_dropout = 0.1: would change the norms that DoRA divides by",
        ),
        ('{kind="loha", rank_dropout=0.1}', "rank_dropout = 0.1: is of factors B and A"),
        ('{rank=4, layers=["*attn*"]}', "is of full fine-tuning: leave it out, or set kind"),
    ],
)
def test_choices_that_do_not_fit_a_kind_are_refused(table: str, told: str) -> None:
    assert told in refusal(f"arms=[{table}]")


def test_full_fine_tuning_is_called_so_and_comes_after_all_ranks() -> None:
    config = study(
        'arms=[{rank=512}, {kind="full", lr=[1e-5, 1e-4]}, {kind="full", layers=["*attn*"], name="part"}]'
    )
    arms = config.expand_arms()
    assert [arm.name for arm in arms] == ["r512-lr0.0001", "full-lr1e-05", "full-lr0.0001", "part"]
    assert {arm.rank for arm in arms[1:]} == {1024} and {arm.scale for arm in arms} == {1.0}
    assert [arm.layers for arm in arms[1:]] == [("*",), ("*",), ("*attn*",)]
    assert len({arm.family for arm in arms}) == 4


def test_an_arm_may_have_the_gain_of_arms_that_differ_in_their_length() -> None:
    arms = study(
        'arms=[{rank=16, lr=1e-3, epochs=[2, 6]}, {rank=64, match_gain="r16", epochs=[2, 6]}]'
    ).expand_arms()
    assert [arm.name for arm in arms[2:]] == ["r64-gain-r16-e2", "r64-gain-r16-e6"]
    assert {arm.lr for arm in arms[2:]} == {5e-4}
