"""What the diagnose stage looks at: a finished training with its base, adapters and pictures."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.files import load_adapter
from lorascope.adapters.mixed import Bank, open_bank
from lorascope.adapters.targets import Target
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.data.encoding import Encoded
from lorascope.diagnosis.edits import arm_of, edit_adapters, on_all
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sweep import Part, plan_edits, plan_sweep
from lorascope.evaluation.sweep_rows import TRAINED, Epoch, Slot
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig

Place = tuple[str, Epoch]  # an arm's adapter of one epoch


@dataclass(frozen=True)
class Finished:
    """What is diagnosed, and with what.

    `arms` are those whose training ended; `train` and `heldout` the encoded pictures; `train_pictures` and
    `heldout_pictures` some of them, as many of either kind, uint8 [height, width, 3].
    """

    config: StudyConfig
    run: RunDir
    base: Base
    targets: Sequence[Target]
    arms: Sequence[Arm]
    prompts: Sequence[Prompt]
    train: Encoded
    heldout: Encoded
    train_pictures: Sequence[NDArray[np.uint8]]
    heldout_pictures: Sequence[NDArray[np.uint8]]

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The adapters that are looked at."""
        wanted = self.config.diagnose.epochs
        return tuple((arm.name, epoch) for arm in self.arms for epoch in epochs_of(self.run, arm, wanted))

    @cached_property
    def parts(self) -> list[Part]:
        """The sweep's plan."""
        epochs = {arm.name: tuple(e for name, e in self.places if name == arm.name) for arm in self.arms}
        section = self.config.diagnose
        edits = plan_edits(self.config.expand_arms(), section)
        return plan_sweep(epochs, self.prompts, self.config.sample, section, edits)

    @cached_property
    def adapters(self) -> Mapping[Place, Adapter]:
        """The adapters by arm and epoch, from their files."""
        folders = {place: self.run.adapters_dir / place[0] for place in self.places}
        return {
            place: load_adapter(folder / "best" if place[1] == "best" else folder)
            for place, folder in folders.items()
        }

    @contextmanager
    def attached(self) -> Iterator[tuple[Bank, Mapping[Place, int]]]:
        """Within, a bank with all adapters acts on the base; and where each lies in it."""
        by_name = {arm.name: arm for arm in self.arms}
        bank = open_bank(self.base.components, self.targets, [by_name[name] for name, _ in self.places])
        for index, place in enumerate(self.places):
            bank.load(index, self.adapters[place])
        with _acting(bank):
            yield bank, {place: index for index, place in enumerate(self.places)}

    @contextmanager
    def attached_to(self, part: Part) -> Iterator[tuple[Bank, Mapping[Slot, int]]]:
        """Within, a bank with the adapters that draw a part acts on the base, edited where its points are;
        and where each lies in it.
        """
        if part.weights == TRAINED:
            with self.attached() as (bank, places):
                yield bank, {(*place, TRAINED): index for place, index in places.items()}
            return
        names = [point.arm for point in part.points]
        trained = {name: self.adapters[name, "last"] for name in names}
        edited = edit_adapters(self.base.components, self.targets, trained, part.weights)
        paths = {path for adapter in edited.values() for path in adapter.modules}
        # What is left of full fine-tuning is LoRA too, on more layers than the others have.
        targets = [
            replace(target, group=None, is_for_full=False)
            for target in self.targets
            if target.name_in_files in paths
        ]
        edited = {name: on_all(targets, adapter) for name, adapter in edited.items()}
        bank = open_bank(self.base.components, targets, [arm_of(name, edited[name]) for name in names])
        for index, name in enumerate(names):
            bank.load(index, edited[name])
        with _acting(bank):
            yield bank, {point.slot: index for index, point in enumerate(part.points)}


@contextmanager
def _acting(bank: Bank) -> Iterator[None]:
    """Within, a bank is attached."""
    bank.attach()
    try:
        yield
    finally:
        bank.detach()


def epochs_of(run: RunDir, arm: Arm, wanted: Sequence[Epoch]) -> tuple[Epoch, ...]:
    """Those of `wanted` that an arm has adapters of, each adapter once."""
    best = run.training(arm.name).get("best")
    has_best = isinstance(best, dict) and best.get("epoch") != arm.epochs
    last: tuple[Epoch, ...] = ("last",) if "last" in wanted or not has_best else ()
    return (*last, *(("best",) if "best" in wanted and has_best else ()))
