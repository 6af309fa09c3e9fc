"""What the diagnose stage looks at: a finished training with its base, adapters and pictures."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.bank import AdapterBank, Target
from lorascope.adapters.files import load_adapter
from lorascope.base.loading import Base
from lorascope.data.encoding import Encoded
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sweep import Part, plan_sweep
from lorascope.evaluation.sweep_rows import Epoch
from lorascope.run_folder import RunDir
from lorascope.schema import Arm, StudyConfig

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
        return plan_sweep(epochs, self.prompts, self.config.sample, self.config.diagnose)

    @cached_property
    def adapters(self) -> Mapping[Place, Adapter]:
        """The adapters by arm and epoch, from their files."""
        folders = {place: self.run.adapters_dir / place[0] for place in self.places}
        return {
            place: load_adapter(folder / "best" if place[1] == "best" else folder)
            for place, folder in folders.items()
        }

    @contextmanager
    def attached(self) -> Iterator[tuple[AdapterBank, Mapping[Place, int]]]:
        """Within, a bank with all adapters acts on the base; and where each lies in it."""
        by_name = {arm.name: arm for arm in self.arms}
        bank = AdapterBank(self.base.components, self.targets, [by_name[name] for name, _ in self.places])
        for index, place in enumerate(self.places):
            bank.load(index, self.adapters[place])
        bank.attach()
        try:
            yield bank, {place: index for index, place in enumerate(self.places)}
        finally:
            bank.detach()


def epochs_of(run: RunDir, arm: Arm, wanted: Sequence[Epoch]) -> tuple[Epoch, ...]:
    """Those of `wanted` that an arm has adapters of, each adapter once."""
    best = run.training(arm.name).get("best")
    has_best = isinstance(best, dict) and best.get("epoch") != arm.epochs
    last: tuple[Epoch, ...] = ("last",) if "last" in wanted or not has_best else ()
    return (*last, *(("best",) if "best" in wanted and has_best else ()))
