"""The train stage: all groups of a study, one after another in this process or side by side in workers, to
the end.

A group that runs out of memory goes on as two from its last checkpoint.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lorascope.adapters.export import write_study_files
from lorascope.adapters.targets import Target
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.console import Tally, log, track
from lorascope.data.encoding import Encoded
from lorascope.errors import RunError
from lorascope.evaluation.prompts import Prompt
from lorascope.machine.memory import parked
from lorascope.machine.workers import Link, run_side_by_side, serve, worker_environments
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.training.group import Group, checkpoint_path, section_of, split_group, try_group
from lorascope.training.packing import ArmGroup, Packing, describe_passes
from lorascope.training.passes import count_models, plan_passes
from lorascope.training.trackers import Trackers, open_trackers
from lorascope.training.trainer import count_steps

_Ended = tuple[ArmGroup, str | None]  # a group whose training ended, and what memory it lacked if it ran out


@dataclass(frozen=True)
class Material:
    """What all groups of a study are trained from."""

    config: StudyConfig
    run_dir: RunDir
    cache_dir: Path
    base: Base
    targets: Sequence[Target]
    train: Encoded
    heldout: Encoded
    prompts: Sequence[Prompt]
    inputs: str  # digest of all that shapes the adapters

    def open_trackers(self, arms: Sequence[Arm]) -> Trackers:
        """The study's trackers, with a run for each of these arms."""
        config = self.config
        return open_trackers(
            config.trackers,
            self.run_dir.path,
            config.name,
            [arm.name for arm in arms],
            config.model_dump(mode="json"),
        )

    def train_group(
        self,
        group: ArmGroup,
        num_side_by_side: int,
        trackers: Trackers,
        tally: Tally,
        is_stopped: Callable[[], bool],
    ) -> str | None:
        """Train one group; returns what could not be allocated if memory runs out, else None."""
        parts = (
            self.config,
            self.run_dir,
            self.base,
            self.targets,
            group,
            self.train,
            self.heldout,
            self.prompts,
        )
        with parked(self.base.device, *self._idle_parts()):
            return try_group(
                lambda: Group(*parts, trackers, self.inputs, num_side_by_side).run(tally, is_stopped),
                self.base.device,
            )

    def _idle_parts(self) -> list[nn.Module]:
        """What of the base training does not touch: the VAE unless it draws previews, the text encoder if all
        text states are kept.
        """
        if self.config.sample.preview_every_epochs:
            return []
        return [self.base.vae] if self.train.text_states is None else [self.base.vae, self.base.text_encoder]


class Training:
    """All groups of a study; `run` trains those that are not trained yet."""

    def __init__(self, material: Material) -> None:
        self.material, self.config, self.run_dir, self.base = (
            material,
            material.config,
            material.run_dir,
            material.base,
        )
        self.arms = self.config.expand_arms()
        self.plan = Packing.load(self.run_dir.groups_json, material.inputs, self.arms) or self._plan()

    def _plan(self) -> Packing:
        """The groups for the memory that is free now, kept in the run folder."""
        num_pictures = self.material.train.num_entries
        plan = plan_passes(
            self.config, self.base.device, count_models(self.config), num_pictures, self.base.components
        )
        plan.save(self.run_dir.groups_json, self.material.inputs)
        return plan

    def run(self) -> Packing:
        """Train to the end, and return the plan as it came out.

        Raises `RunError` where an arm alone does not fit into memory, and where no arm of the study is left.
        """
        for line in describe_passes([group.names for group in self.plan.groups], self.plan.num_workers):
            log.info("train    %s", line)
        todo = deque(group for group in self.plan.groups if not self._is_trained(group))
        for group in self.plan.groups:
            if group not in todo:
                self._leave(group)
        train_all = self._train_here if self.plan.num_workers == 1 else self._train_side_by_side
        with (
            track("train", sum(map(self._num_steps, todo)), "steps") as task,
            closing(train_all(todo, task)) as ended,
        ):
            for group, lack in ended:
                if lack is None:
                    self._leave(group)
                else:
                    parts = self._make_room(group, lack)
                    todo.extend(parts)
                    task.set_total(task.total + (len(parts) - 1) * self._num_steps(group))
        self._require_an_arm()
        self.run_dir.join_metrics(arm.name for arm in self.arms)
        for path in self.run_dir.checkpoints_dir.glob("*.safetensors"):  # of groups that were halved
            path.unlink()
        return self.plan

    def _num_steps(self, group: ArmGroup) -> int:
        return count_steps(section_of(self.config, group), self.material.train.num_entries)

    def _is_trained(self, group: ArmGroup) -> bool:
        return all((self.run_dir.adapters_dir / arm.name / "training.json").exists() for arm in group.arms)

    def _leave(self, group: ArmGroup) -> None:
        """What is to do once a group is trained."""
        for arm in group.arms:
            if self.run_dir.failure(arm.name) is None:
                write_study_files(self.run_dir, self.config, arm)
        checkpoint_path(self.run_dir, group).unlink(missing_ok=True)

    def _require_an_arm(self) -> None:
        """Raise `RunError` if all arms have failed."""
        failures = {arm.name: self.run_dir.failure(arm.name) for arm in self.arms}
        if all(failures.values()):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
            raise RunError(f"no arm is left ({reasons}): lower arms.lr, or set train.precision = 'fp32'")

    def _make_room(self, group: ArmGroup, lack: str) -> list[ArmGroup]:
        """What to go on with, from the last checkpoint, where a group ran out of memory; the kept plan has it
        too.
        """
        parts = smaller(group, lack, self.config.train.gradient_checkpointing)
        split_group(self.run_dir, group, parts, self.material.inputs)
        self.plan = self.plan.split(group, parts)
        self.plan.save(self.run_dir.groups_json, self.material.inputs)
        return parts

    def _train_here(self, todo: deque[ArmGroup], tally: Tally) -> Generator[_Ended, None, None]:
        """Train groups one after another in this process; yields each with what lacked, if anything."""
        with self.material.open_trackers(self.arms) as trackers:
            while todo:
                group = todo.popleft()
                yield group, self.material.train_group(group, 1, trackers, tally, lambda: False)

    def _train_side_by_side(self, todo: deque[ArmGroup], tally: Tally) -> Generator[_Ended, None, None]:
        """As `_train_here`, but each group in a worker process of its own.

        A worker that dies, as one that the system ends for want of memory, is taken for out of memory the
        first time.
        """
        if self.config.trackers:
            self.material.open_trackers(self.arms).close()  # so that no two workers write trackers.json
        setup = {
            "run_dir": str(self.run_dir.path.resolve()),
            "cache_dir": str(self.material.cache_dir.resolve()),
            "num_workers": self.plan.num_workers,
        }
        mourned: set[str] = set()
        assert self.run_dir.lock_descriptor is not None
        with parked(self.base.device, *self.base.components.values(), self.base.vae):
            for group, answer in run_side_by_side(
                todo,
                lambda group: (
                    group.label,
                    {"arms": group.names, "gradient_checkpointing": group.gradient_checkpointing},
                ),
                "lorascope.study.serve_groups",
                setup,
                worker_environments(self.base.device.type, self.plan.num_workers),
                [self.run_dir.lock_descriptor],
                tally,
            ):
                if answer.death is not None and mourned & set(group.names):
                    raise RunError(
                        f"the process that trained {', '.join(group.names)} {answer.death} again: if "
                        "memory is short, set workers = 1 or lower train.batch_size; the log of the "
                        "system may say more"
                    )
                if answer.death is not None:
                    mourned |= set(group.names)
                yield group, f"its process {answer.death}" if answer.death else answer.value


def smaller(group: ArmGroup, lack: str, asked: bool | None) -> list[ArmGroup]:
    """A group that did not fit as two, or an arm alone with gradient checkpointing unless `asked` says
    otherwise.

    Raises `RunError` where neither can be.
    """
    if len(group.arms) > 1:
        parts = group.halves()
        shown = " and ".join(", ".join(part.names) for part in parts)
        log.warning(
            "train    out of memory (%s): going on from the last checkpoint in passes of %s", lack, shown
        )
        return parts
    name = group.arms[0].name
    if group.gradient_checkpointing or asked is not None:
        more = ", or set train.gradient_checkpointing = true" if asked is False else ""
        raise RunError(
            f"arm {name}: not enough memory for it alone ({lack}): in another folder, lower its batch_size "
            f"(train.accumulation_steps makes up for that) or data.resolution_px{more}"
        )
    log.warning(
        "train    out of memory (%s): %s goes on from the last checkpoint with gradient checkpointing",
        lack,
        name,
    )
    return [replace(group, gradient_checkpointing=True)]


def serve_material(prepare: Callable[[dict[str, Any]], Material]) -> None:
    """Be a worker process of `Training`: train the groups that it gives, from what `prepare` makes of its
    setup.
    """

    def start(setup: dict[str, Any]) -> Callable[[dict[str, Any], Link], str | None]:
        material = prepare(setup)
        arms = {arm.name: arm for arm in material.config.expand_arms()}

        def train_group(task: dict[str, Any], link: Link) -> str | None:
            group = ArmGroup(tuple(arms[name] for name in task["arms"]), task["gradient_checkpointing"])
            with material.open_trackers(group.arms) as trackers:
                return material.train_group(group, setup["num_workers"], trackers, link, link.is_stopped)

        return train_group

    serve(start)
