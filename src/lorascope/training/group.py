"""One group of arms trained in one pass, in a run folder: its records, probes, previews, checkpoints and
adapters.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.files import save_adapter
from lorascope.adapters.targets import Target, count_parameters
from lorascope.base.loading import Base
from lorascope.base.weights import load_sealed, save_sealed
from lorascope.console import Tally, duration, log, size
from lorascope.data.encoding import Encoded
from lorascope.errors import RunError, WeightsError, first_line
from lorascope.evaluation.prompts import Prompt
from lorascope.evaluation.sampling import (
    Job,
    batches_of,
    draw_pictures,
    latent_shape_of,
    plan_jobs,
    save_picture,
)
from lorascope.machine.memory import (
    free_cached,
    is_out_of_memory,
    peak_memory,
    reserved_peak,
    reset_peak_memory,
    used_bytes,
)
from lorascope.machine.workers import deferred_signals
from lorascope.run_folder import JsonLines, RunDir
from lorascope.schema import StudyConfig
from lorascope.sections import TrainSection
from lorascope.store import digest_json, write_json
from lorascope.training.footprint import resolve_checkpointing
from lorascope.training.packing import ArmGroup
from lorascope.training.probe import probe_losses, probe_records
from lorascope.training.trackers import Trackers
from lorascope.training.trainer import (
    CheckpointPart,
    StepRecord,
    Trainer,
    count_steps,
    read_checkpoint_facts,
    split_checkpoint,
)


class Group:
    """Arms that share one pass; `run` trains them to the end and leaves each in `adapters/<arm>/`."""

    def __init__(
        self,
        config: StudyConfig,
        run_dir: RunDir,
        base: Base,
        targets: Sequence[Target],
        group: ArmGroup,
        train: Encoded,
        heldout: Encoded,
        prompts: Sequence[Prompt],
        trackers: Trackers,
        inputs: str,
        num_side_by_side: int,
    ) -> None:
        self.config, self.run_dir, self.base, self.trackers = config, run_dir, base, trackers
        self.arms, self.num_side_by_side = group.arms, num_side_by_side
        reset_peak_memory(base.device)
        estimate, self.section = resolve_checkpointing(
            base, targets, self.arms, section_of(config, group), train.largest_shape()
        )
        self.expected_bytes = used_bytes(base.device) + estimate.training_bytes
        self.bank = AdapterBank(base.components, targets, self.arms)
        self.trainer = Trainer(base, self.bank, train, self.section, config.data)
        self.probed = {
            "heldout": heldout.first(config.train.num_probe),
            "train": train.first(config.train.num_probe),
        }
        self.previews = (
            preview_jobs(prompts, config.sample.num_previews) if config.sample.preview_every_epochs else []
        )
        previewed = range(
            config.sample.preview_every_epochs or 1,
            self.section.epochs + 1,
            config.sample.preview_every_epochs or 1,
        )
        self.preview_steps = {count_steps(self.section, train.num_entries, epoch) for epoch in previewed}
        self.metrics = {
            name: JsonLines(run_dir.metrics_part(name))
            for name in ["base"] * self.has_first_arm + group.names
        }
        self.checkpoint, self.inputs = checkpoint_path(run_dir, group), checkpoint_inputs(inputs, group)
        self.failures: dict[str, str] = {}
        self.last_epoch: dict[str, list[float]] = {arm.name: [] for arm in self.arms}  # losses
        self.best: dict[str, dict[str, Any]] = {}
        self.skipped_steps: dict[str, int] = {}  # whose gradient overflowed fp16

    @property
    def has_first_arm(self) -> bool:
        """Whether the study's first arm is here: its group also records the base."""
        return self.config.expand_arms()[0] in self.arms

    def run(self, tally: Tally, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Train from the last checkpoint, or from the start, to the end; `tally` counts the steps.

        A first Ctrl-C, or `is_stopped`, ends a step whole, keeps a checkpoint and raises `KeyboardInterrupt`.
        An arm whose loss or gradient is not finite has failed and stands still from there on.
        """
        self._log_plan()
        self.bank.attach()
        try:
            self._resume()
            tally.skip(self.trainer.step)
            self._take_steps(tally, is_stopped)
            for lines in self.metrics.values():
                lines.sync()
            mode = self.trainer.compute.mode
        except Exception:
            tally.skip(-self.trainer.step)  # they will be counted again
            raise
        finally:
            for lines in self.metrics.values():
                lines.close()
            self.trainer.compute.close()
            self.bank.detach()
            self.base.unet.disable_gradient_checkpointing()
        for index in range(len(self.arms)):
            self._finish_arm(index, mode)
        self._log_end(mode)

    def _take_steps(self, tally: Tally, is_stopped: Callable[[], bool]) -> None:
        """Train to the end, or until no arm is left: records of every step, probes after every epoch, and
        checkpoints.
        """
        trainer, section = self.trainer, self.section
        base_losses = self._probe_base()
        epoch_ends = {
            count_steps(section, trainer.train.num_entries, epoch): epoch
            for epoch in range(1, section.epochs + 1)
        }
        with deferred_signals() as interrupted:

            def stops() -> bool:
                return interrupted() or is_stopped()

            def keeps(step: int) -> bool:
                return step % section.checkpoint_every_steps == 0 and step < trainer.num_steps

            for record in trainer.run(pause=lambda step: step in epoch_ends or keeps(step) or stops()):
                self._record_step(record)
                if record.step in epoch_ends:
                    self._end_epoch(record.step, epoch_ends[record.step], base_losses)
                # else the step after it is done already, and its record comes
                is_last = stops() and record.step == trainer.step
                if is_last or keeps(record.step):
                    self._save_checkpoint()
                tally.advance(1, self._figures(record))
                if is_last:
                    log.info(
                        "train    stopped after step %d; the same command goes on from here", record.step
                    )
                    raise KeyboardInterrupt
                if len(self.failures) == len(self.arms):
                    break

    def _figures(self, record: StepRecord) -> str:
        """Speed and losses for the bar."""
        rate = self.section.batch_size * self.section.accumulation_steps * len(self.arms) / record.seconds
        losses = "  ".join(
            f"{arm.name} failed" if arm.name in self.failures else f"{arm.name} {loss:.4f}"
            for arm, loss in zip(self.arms, record.losses, strict=True)
        )
        return f"{rate:.0f} pictures/s  {losses}"

    def _log_plan(self) -> None:
        counts = {arm.name: count_parameters(self.bank.targets, arm) for arm in self.arms}
        shown = ", ".join(
            f"{name} {count:,} parameters ({size(4 * count)})" for name, count in counts.items()
        )
        log.info("train    %d modules: %s", len(self.bank.targets), shown)
        together = " each, in one pass" if len(self.arms) > 1 else ""
        pictures = self.section.batch_size * self.section.accumulation_steps
        log.info("train    %d steps of %d pictures%s", self.trainer.num_steps, pictures, together)
        log.debug("train    %s", self.trainer.compute.mode)
        if len(self.trainer.feed.buckets) > 1:
            log.info("train    %d shapes of pictures, one shape a batch", len(self.trainer.feed.buckets))

    def _log_end(self, mode: str) -> None:
        memory, kind = peak_memory(self.base.device)
        reserved = reserved_peak(self.base.device)
        beside = f"; {size(reserved)} of the GPU were reserved" if reserved else ""
        log.info(
            "memory   expected %s, measured %s (%s)%s", size(self.expected_bytes), size(memory), kind, beside
        )
        log.info("train    steps ran as %s", mode)
        if len(self.failures) < len(self.arms):
            seconds = duration(self.trainer.seconds)
            log.info("train    done: %s in steps, the rest in probes and previews", seconds)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        facts = {
            "metrics_bytes": {name: lines.sync() for name, lines in self.metrics.items()},
            "failures": self.failures,
            "last_epoch": self.last_epoch,
            "best": self.best,
        }
        self.trainer.save_checkpoint(self.checkpoint, self.inputs, facts)

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            for lines in self.metrics.values():  # of a training whose checkpoint was damaged and deleted
                lines.rewind(0)
            self._save_checkpoint()
            return
        facts = self.trainer.load_checkpoint(self.checkpoint, self.inputs)
        for name, lines in self.metrics.items():
            lines.rewind(facts["metrics_bytes"][name])
        self.failures, self.last_epoch, self.best = facts["failures"], facts["last_epoch"], facts["best"]
        if self.trainer.step:
            log.info("train    going on from step %d", self.trainer.step)

    # -- records ---------------------------------------------------------------------------------------------

    def _record_step(self, record: StepRecord) -> None:
        self.skipped_steps = dict(zip((arm.name for arm in self.arms), record.skipped, strict=True))
        for arm, loss, norm, lr, failed in zip(
            self.arms, record.losses, record.grad_norms, record.lrs, record.failed, strict=True
        ):
            if failed:
                if arm.name not in self.failures:
                    self._fail(arm.name, f"loss or gradient is not finite at step {record.step}")
                continue
            # Only of a step that the arm skipped is it not finite.
            values = {"loss": loss, "grad_norm": norm if math.isfinite(norm) else None, "lr": lr}
            epoch = round(record.epoch, 6)
            self.metrics[arm.name].append(
                {"kind": "train", "step": record.step, "epoch": epoch, "arm": arm.name, **values}
            )
            self.trackers.log(
                arm.name, record.step, {key: value for key, value in values.items() if value is not None}
            )
            if record.step > self.trainer.num_steps - self.trainer.num_steps / self.section.epochs:
                self.last_epoch[arm.name].append(loss)

    def _fail(self, name: str, reason: str) -> None:
        self.failures[name] = reason
        log.warning("train    %s failed: %s; other arms go on", name, reason)

    def _probe(self, slices: Sequence[Slice]) -> dict[tuple[str, bool], torch.Tensor]:
        """The denoising loss of each slice by split and whether captions were given: float32 [S, pictures,
        bands] each.
        """
        conditions = (True, False)
        measured = {
            split: probe_losses(self.base, self.bank, slices, pictures, conditions)
            for split, pictures in self.probed.items()
        }
        return {
            (split, conditional): losses
            for split, table in measured.items()
            for conditional, losses in zip(conditions, table, strict=True)
        }

    def _probe_base(self) -> dict[tuple[str, bool], torch.Tensor]:
        """The base's losses, which every record is compared with; recorded once in a study."""
        losses = self._base_losses()
        if self.trainer.step == 0 and self.has_first_arm:
            for key, values in losses.items():
                self._record_probe("base", 0, 0, key, values, values)
            if self.previews:
                self._draw_previews({"base": Slice(0, 0.0)}, 0, 0)
        return losses

    def _base_losses(self) -> dict[tuple[str, bool], torch.Tensor]:
        """The base's losses as `_probe` gives them, measured once in a run folder: on a CPU that takes longer
        than to start.
        """
        path, pictures = self.run_dir.checkpoints_dir / "base.safetensors", self.probed.values()
        facts = [
            self.base.digest,
            str(self.base.device),
            str(self.base.unet.dtype),
            [[part.digests, part.captions] for part in pictures],
        ]
        key = digest_json(facts)
        names = {
            (split, conditional): f"{split} {conditional}"
            for split in self.probed
            for conditional in (True, False)
        }
        try:
            kept, metadata = load_sealed(path)
            if metadata["key"] == key:
                return {probe: kept[name] for probe, name in names.items()}
        except (WeightsError, KeyError):
            pass  # not there, or of no use: measured anew
        losses = {probe: values[0] for probe, values in self._probe([Slice(0, 0.0)]).items()}
        save_sealed(path, {names[probe]: values for probe, values in losses.items()}, {"key": key})
        return losses

    def _end_epoch(self, step: int, epoch: int, base_losses: Mapping[tuple[str, bool], torch.Tensor]) -> None:
        slices = {
            arm.name: Slice(index) for index, arm in enumerate(self.arms) if arm.name not in self.failures
        }
        if not slices:
            return
        losses = self._probe(list(slices.values()))
        for row, (name, item) in enumerate(slices.items()):
            if not all(values[row].isfinite().all() for values in losses.values()):
                self._fail(name, f"loss is not finite after step {step}")
                self.trainer.compute.active[item.adapter] = False
                continue
            for key, values in losses.items():
                self._record_probe(name, step, epoch, key, values[row], base_losses[key])
            heldout = float(losses["heldout", True][row].double().mean())
            self.trackers.log(
                name,
                step,
                {
                    "heldout_loss": heldout,
                    "train_probe_loss": float(losses["train", True][row].double().mean()),
                },
            )
            if (
                self.config.train.keep_best
                and heldout < self.best.get(name, {"heldout_loss": float("inf")})["heldout_loss"]
            ):
                self.best[name] = {"step": step, "epoch": epoch, "heldout_loss": heldout}
                save_adapter(
                    self.bank.adapter(item.adapter), self.run_dir.adapters_dir / name / "best", "peft", "fp32"
                )
        slices = {name: item for name, item in slices.items() if name not in self.failures}
        if slices and self.previews and step in self.preview_steps:
            self._draw_previews(slices, step, epoch)
        self.bank.select_all()

    def _record_probe(
        self,
        arm: str,
        step: int,
        epoch: int,
        key: tuple[str, bool],
        losses: torch.Tensor,
        reference: torch.Tensor,
    ) -> None:
        split, conditional = key
        for record in probe_records(losses, reference, len(self.base.alphas_cumprod)):
            self.metrics[arm].append(
                {
                    "kind": "probe",
                    "step": step,
                    "epoch": epoch,
                    "arm": arm,
                    "split": split,
                    "conditional": conditional,
                    **record,
                }
            )

    def _draw_previews(self, slices: Mapping[str, Slice], step: int, epoch: int) -> None:
        """Draw the fixed prompts with each slice; writes `previews/<arm>/epoch-<number>/`.

        An arm whose pictures cannot be drawn is a warning: training goes on.
        """
        section, shape = self.config.sample, latent_shape_of(self.base, self.config.data.resolution_px)
        for name, item in slices.items():
            try:
                for jobs in batches_of(self.previews, 1, section.batch_size):
                    pictures, _ = draw_pictures(self.base, self.bank, [item], jobs, shape, section)
                    for job, picture in zip(jobs, pictures[0].numpy(), strict=True):
                        save_picture(
                            self.run_dir.preview_path(name, epoch, job.file_name), picture, job, name, section
                        )
                        if name != "base":
                            self.trackers.log_image(name, step, job.prompt.text, picture)
            except RunError as error:
                log.warning("train    no preview of %s after epoch %d: %s", name, epoch, error)

    # -- the end ---------------------------------------------------------------------------------------------

    def _finish_arm(self, index: int, mode: str) -> None:
        arm, section, trainer = self.arms[index], self.section, self.trainer
        folder = self.run_dir.adapters_dir / arm.name
        memory, memory_kind = peak_memory(self.base.device)
        failure = self.failures.get(arm.name)
        pictures = trainer.step * section.batch_size * section.accumulation_steps * len(self.arms)
        facts: dict[str, Any] = {
            **arm.model_dump(),
            "arm": arm.name,
            "scale": arm.scale,
            "steps": trainer.step,
            "epochs": section.epochs,
            "modules": len(self.bank.targets),
            "parameters": count_parameters(self.bank.targets, arm),
            "group": [other.name for other in self.arms],
            "side_by_side": self.num_side_by_side,
            "run_time_s": round(trainer.seconds, 3),
            "images_per_s": round(pictures / max(trainer.seconds, 1e-9), 3),
            "gradient_checkpointing": section.gradient_checkpointing,
            "expected_memory_bytes": self.expected_bytes,
            "peak_memory_bytes": memory,
            "peak_memory_kind": memory_kind,
            "peak_reserved_bytes": reserved_peak(self.base.device),
            "step": mode,
            "skipped_steps": self.skipped_steps.get(arm.name, 0),
            "best": self.best.get(arm.name),
            "failed": failure,
        }
        if failure is None:
            facts["file_bytes"] = save_adapter(self.bank.adapter(index), folder, "peft", "fp32").num_bytes
            facts["final_loss"] = float(np.mean(self.last_epoch[arm.name]))
        facts["digests"] = self.run_dir.adapter_digests(arm.name)
        write_json(folder / "training.json", facts)


def preview_jobs(prompts: Sequence[Prompt], count: int) -> list[Job]:
    """`count` prompts, or as many as there are, taken from all categories in turn, under seed 0."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    longest = max(map(len, by_category.values()))
    turns = [texts[index] for index in range(longest) for texts in by_category.values() if index < len(texts)]
    return plan_jobs(turns[:count], [0])


def section_of(config: StudyConfig, group: ArmGroup) -> TrainSection:
    """The study's `train` as it is for a group: its batch size and epochs are the arms'."""
    changes: dict[str, Any] = {"batch_size": group.arms[0].batch_size, "epochs": group.arms[0].epochs}
    if group.gradient_checkpointing:
        changes["gradient_checkpointing"] = True
    return config.train.model_copy(update=changes)


def checkpoint_path(run_dir: RunDir, group: ArmGroup) -> Path:
    """Where the state of a group's unfinished training lies."""
    return run_dir.checkpoints_dir / f"{group.key}.safetensors"


def checkpoint_inputs(inputs: str, group: ArmGroup) -> str:
    """Digest of all that a group's checkpoint belongs to, from that of the study's training."""
    return digest_json([inputs, group.names])


def split_group(run_dir: RunDir, group: ArmGroup, parts: Sequence[ArmGroup], inputs: str) -> None:
    """Give each of `parts` its arms' share of a group's last checkpoint, if there is one; the group's own
    stays.
    """
    path = checkpoint_path(run_dir, group)
    if not path.exists():
        return
    facts = read_checkpoint_facts(path)
    shares = []
    for part in parts:
        known = {"base", *part.names}
        own = {
            key: {name: value for name, value in values.items() if name in known}
            for key, values in facts.items()
        }
        shares.append(
            CheckpointPart(checkpoint_path(run_dir, part), part.names, checkpoint_inputs(inputs, part), own)
        )
    split_checkpoint(path, shares)


def try_group(train: Callable[[], None], device: torch.device) -> str | None:
    """Call `train`; where memory runs out, free what it held and return what could not be allocated, in
    words.
    """
    try:
        train()
        return None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size_asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        reason = size_asked[0].lower() if size_asked else first_line(error)
    free_cached(device)  # the error's traceback held everything
    return reason
