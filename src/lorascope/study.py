"""A study: its stages run in order in a run folder.

Every stage can be called alone and again; what is finished for the same inputs is skipped.
"""

import datetime
import functools
import importlib.metadata
import logging
import os
import platform
import subprocess
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorascope import __version__
from lorascope.adapter import AdapterBank, Slice, Target, resolve_section
from lorascope.adapter_files import load_adapter
from lorascope.base import Base, choose_device, load_base, load_tokenizer, read_configs
from lorascope.cache import Encoded, default_cache_dir, encode_dataset
from lorascope.config import Arm, StudyConfig, load_study
from lorascope.console import Tally, duration, log, log_to_file, track
from lorascope.data import Dataset, load_dataset, prepare_data
from lorascope.errors import ConfigError, RunError, StorageError
from lorascope.export import merged_into, write_study_files
from lorascope.features import check_encoder, load_encoder
from lorascope.group import Group, checkpoint_path, section_of, split_group, try_group
from lorascope.memory import parked
from lorascope.optimizers import check_optimizer
from lorascope.plan import count_models, plan_passes
from lorascope.prompts import Prompt, load_prompts
from lorascope.report import Report, build_report
from lorascope.sample import Job, draw_all, draw_pictures, latent_shape_of, plan_jobs
from lorascope.score import Generated, score_run
from lorascope.store import RunDir, digest_json, read_json, write_json, write_text
from lorascope.trackers import Trackers, open_trackers, require_trackers
from lorascope.train import count_steps
from lorascope.trials import TrialGroup, TrialPlan, describe_passes
from lorascope.tuning import Tuning, build_workload, device_name, tune
from lorascope.workers import Link, run_side_by_side, serve, worker_environments

MERGE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # relative l2 error of the final latents
_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "scipy", "pillow", "pyarrow", "pydantic", "matplotlib")

_Ended = tuple[TrialGroup, str | None]  # a group whose training ended, and how memory ran out if it did


class Study:
    """One study in its run folder."""

    def __init__(self, config: StudyConfig, run_dir: Path, cache_dir: Path | None = None) -> None:
        self.config = config
        self.run_dir = RunDir(run_dir)
        self.cache_dir = cache_dir or default_cache_dir()
        self.device = choose_device(config.device)

    @classmethod
    def open(cls, run_dir: Path, cache_dir: Path | None = None) -> "Study":
        """The study of an existing run folder; raise `ConfigError` if it holds none."""
        if not (run_dir / "study.toml").is_file():
            raise ConfigError(f"{run_dir}: no study.toml here: name a run folder, or start one with `lorascope study`")
        return cls(load_study(run_dir / "study.toml", environment={}), run_dir, cache_dir)

    def run(self, command: str = "lorascope.Study.run()") -> Report:
        """All stages, then the report.

        Raises `RunError` at the end when an arm failed or merged and unmerged outputs differ; everything else is done
        and kept by then.
        """
        report = self.run_stages(command)
        self.raise_faults()
        return report

    def run_stages(self, command: str) -> Report:
        """As `run`, but faults are left to `raise_faults`, so that the report can be shown before them."""
        with self.working(command):
            self.check_inputs()
            self.prepare_data()
            self.encode()
            self.train()
            self.sample()
            self.check_merge()
            self.score()
            return self.report()

    def check_inputs(self) -> None:
        """Fail on prompts, scorer or adapter targets that cannot be used now rather than after hours of training."""
        log.debug("prompts  %d", len(self.prompts))
        check_optimizer(self.config)
        require_trackers(self.config.trackers)
        check_encoder(self.config.score)
        log.debug("targets  %d modules", len(self.targets))

    @contextmanager
    def working(self, command: str) -> Iterator[None]:
        """Hold the run folder, freeze the configuration in it, and log to it."""
        with self.run_dir.lock():
            self._freeze()
            with log_to_file(self.run_dir.log_path):
                self._describe(command)
                yield

    def _freeze(self) -> None:
        """Write `study.toml`, or raise `ConfigError` if the folder belongs to another configuration."""
        path = self.run_dir.study_toml
        if not path.exists():
            write_text(path, self.config.to_toml())
            return
        frozen = load_study(path, environment={})
        changed = _differences(frozen.model_dump(mode="json"), self.config.model_dump(mode="json"))
        if changed:
            key, old, new = changed[0]
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ConfigError(
                f"{self.run_dir.path}: made with another configuration: {key} was {old!r}, now {new!r}{more}: "
                "choose another folder with --run-dir, or delete this one"
            )

    def _describe(self, command: str) -> None:
        facts = self.run_dir.manifest()
        self.run_dir.describe(
            lorascope=__version__,
            versions={"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}},
            commit=_commit(),
            device=_device_facts(self.device),
            command=facts.get("command", command),
            started=facts.get("started", _now()),
            config_digest=self.config.digest(),
        )

    @functools.cached_property
    def tuning(self) -> Tuning:
        """What is fastest here for the run's own shapes; a run folder keeps the precision it began with, and on one device all of it."""
        config, configs = self.config, read_configs(self.config.base)
        arms = config.expand_arms()
        stacked = min(len(arms), config.train.max_stacked_arms or 4)
        branches = 1 if config.sample.guidance == 1 else 2
        workload = build_workload(
            configs, config.data.resolution_px, stacked * max(arm.batch_size for arm in arms), config.sample.batch_size * branches
        )
        kept = self.run_dir.manifest().get("tuning")
        tuning = tune(configs["unet"], workload, self.device, config.train.precision, kept)
        if tuning.to_json() != kept:
            self.run_dir.describe(tuning=tuning.to_json())
        for note in (f"U-Net in {tuning.precision}", *tuning.notes):
            log.info("tuning   %s", note)
        return tuning

    @functools.cached_property
    def base(self) -> Base:
        """The frozen base, loaded at first use."""
        base = load_base(self.config.base, self.device, self.tuning.precision)
        self.tuning.apply(base.unet)
        shown = base.describe()
        log.info(
            "base     %s (%s): U-Net %.1f M, VAE %.1f M, text encoder %.1f M parameters; %s, predicts %s; digest %s",
            self.config.base.model,
            base.source,
            *(shown["parameters"][part] / 1e6 for part in ("unet", "vae", "text_encoder")),
            shown["dtype"],
            base.prediction_type,
            base.digest[:12],
        )
        self.run_dir.describe(base={**shown, "model": self.config.base.model})
        return base

    @functools.cached_property
    def targets(self) -> list[Target]:
        """The adapted layers."""
        targets = resolve_section(self.base.components, self.config.adapter)
        names = [*self.config.adapter.targets, *(name for group in self.config.adapter.groups for name in group.targets)]
        self.run_dir.describe(adapter={"modules": len(targets), "targets": names})
        return targets

    @contextmanager
    def _stage(self, name: str, inputs: str) -> Iterator[Callable[..., None]]:
        """Time a stage and record its end with the facts given to the yielded function."""
        facts: dict[str, Any] = {}
        started = time.perf_counter()
        yield facts.update
        self.run_dir.finish(name, inputs, time.perf_counter() - started, **facts)

    # -- data ---------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> Dataset:
        """Check the pictures and captions, find duplicates, split; writes `data.json`."""
        inputs = self.config.digest("data", "base")
        if self.run_dir.is_finished("data", inputs) and self.run_dir.data_json.exists():
            return self.dataset
        tokenizer = load_tokenizer(self.config.base)
        with self._stage("data", inputs) as note:
            with track("data", 1, "pictures") as task:

                def show(done: int, total: int) -> None:
                    task.set_total(total)
                    task.advance(done - task.completed)

                dataset = prepare_data(
                    self.config.data, lambda caption: len(tokenizer(caption).input_ids), tokenizer.model_max_length, show
                )
            self._require_same_data(inputs, dataset)
            write_json(self.run_dir.data_json, dataset.summary)
            note(fingerprint=dataset.summary["fingerprint"])
        summary = dataset.summary
        log.info(
            "data     %d pictures to train on, %d held out; %d refused, %d treated; groups of duplicates: %d (data.json lists them)",
            len(dataset.train), len(dataset.heldout), len(summary["refused"]), len(summary["treated"]), len(summary["duplicates"]),
        )  # fmt: skip
        return dataset

    def _require_same_data(self, inputs: str, dataset: Dataset) -> None:
        """Raise `StorageError` where `data.json` was lost and the source does not give the same any more."""
        known = self.run_dir.manifest()["stages"].get("data", {"inputs": None})
        if known["inputs"] == inputs and known["fingerprint"] != dataset.summary["fingerprint"]:
            raise StorageError(
                f"{self.run_dir.data_json}: lost, and pictures or captions of {self.config.data.source!r} have changed since: "
                "put either back, or run in another folder"
            )

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The pictures of the run, from `data.json`."""
        return load_dataset(self.config.data, read_json(self.run_dir.data_json))

    # -- encode -------------------------------------------------------------------------------------------------------

    def encode(self) -> tuple[Encoded, Encoded]:
        """Train and held-out pictures as latents and text states, from the cache where they are in it."""
        return self.encoded

    @functools.cached_property
    def encoded(self) -> tuple[Encoded, Encoded]:
        """Encoded train and held-out pictures."""
        dataset = self.dataset
        inputs = digest_json([dataset.summary["fingerprint"], self.base.digest])
        started = time.perf_counter()
        with track("encode", len(dataset.train) + len(dataset.heldout), "pictures") as task:
            section = self.config.data
            keeps_text = not (section.shuffle_tags or any(target.component == "text_encoder" for target in self.targets))
            train, heldout, num_encoded = encode_dataset(
                dataset, self.base, self.cache_dir, flip=section.flip, keep_text=keeps_text, progress=task.advance
            )
        seconds = time.perf_counter() - started
        rate = f"{num_encoded:,} pictures in {duration(seconds)}, {num_encoded / seconds:.0f} pictures/s"
        log.info("encode   %s", rate if num_encoded else "all in the cache")
        if not self.run_dir.is_finished("encode", inputs):
            self.run_dir.finish("encode", inputs, seconds, encoded=num_encoded)
        return train, heldout

    # -- train --------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train all arms, in groups that share one pass, some side by side; writes `adapters/`, `groups.json` and `metrics.jsonl`.

        A group that runs out of memory goes on as two from its last checkpoint; an arm that does so alone goes on with gradient
        checkpointing. Raises `RunError` where that is not enough, and where no arm of the study is left.
        """
        inputs = self._train_inputs()
        if self.run_dir.is_finished("train", inputs):
            return
        arms = self.config.expand_arms()
        plan = TrialPlan.load(self.run_dir.groups_json, inputs, arms) or self._plan_trials(inputs)
        for line in describe_passes([group.names for group in plan.groups], plan.num_workers):
            log.info("train    %s", line)
        with self._stage("train", inputs) as note:
            todo = deque(group for group in plan.groups if not self._is_trained(group))
            for group in plan.groups:
                if group not in todo:
                    self._leave_group(group)
            with track("train", sum(map(self._num_steps, todo)), "steps") as task:
                train_all = self._train_here if plan.num_workers == 1 else self._train_side_by_side
                with closing(train_all(todo, inputs, plan.num_workers, task)) as ended:
                    for group, lack in ended:
                        if lack is None:
                            self._leave_group(group)
                            continue
                        parts = self._make_room(group, lack)
                        split_group(self.run_dir, group, parts, inputs)
                        plan = plan.split(group, parts)
                        plan.save(self.run_dir.groups_json, inputs)
                        todo.extend(parts)
                        task.set_total(task.total + (len(parts) - 1) * self._num_steps(group))
            self._require_an_arm()
            self.run_dir.join_metrics(arm.name for arm in arms)
            for path in self.run_dir.checkpoints_dir.glob("*.safetensors"):  # of groups that were halved
                path.unlink()
            note(side_by_side=plan.num_workers, passes=[group.names for group in plan.groups])

    def _plan_trials(self, inputs: str) -> TrialPlan:
        """The groups for the memory that is free now, kept in the run folder."""
        plan = plan_passes(self.config, self.device, count_models(self.config), self.encoded[0].num_entries, self.base.components)
        plan.save(self.run_dir.groups_json, inputs)
        return plan

    def _num_steps(self, group: TrialGroup) -> int:
        return count_steps(section_of(self.config, group), self.encoded[0].num_entries)

    def _is_trained(self, group: TrialGroup) -> bool:
        return all((self.run_dir.adapters_dir / arm.name / "training.json").exists() for arm in group.arms)

    def _leave_group(self, group: TrialGroup) -> None:
        """What is to do once a group is trained."""
        for arm in group.arms:
            if self._training(arm)["failed"] is None:
                write_study_files(self.run_dir, self.config, arm)
        checkpoint_path(self.run_dir, group).unlink(missing_ok=True)

    def train_group(
        self, group: TrialGroup, inputs: str, num_side_by_side: int, trackers: Trackers, tally: Tally, is_stopped: Callable[[], bool]
    ) -> str | None:
        """Train one group; returns what could not be allocated if memory runs out, else None."""
        train, heldout = self.encoded
        parts = (self.config, self.run_dir, self.base, self.targets, group, train, heldout, self.prompts)
        with parked(self.device, *self._idle_parts(train)):
            return try_group(lambda: Group(*parts, trackers, inputs, num_side_by_side).run(tally, is_stopped), self.device)

    def open_trackers(self, arms: Sequence[Arm]) -> Trackers:
        """The study's trackers, with a run for each of these arms."""
        config = self.config
        return open_trackers(config.trackers, self.run_dir.path, config.name, [arm.name for arm in arms], config.model_dump(mode="json"))

    def _train_here(self, todo: deque[TrialGroup], inputs: str, num_workers: int, tally: Tally) -> Generator[_Ended, None, None]:
        """Train groups one after another in this process; yields each with what lacked, if anything."""
        with self.open_trackers(self.config.expand_arms()) as trackers:
            while todo:
                group = todo.popleft()
                yield group, self.train_group(group, inputs, num_workers, trackers, tally, lambda: False)

    def _train_side_by_side(self, todo: deque[TrialGroup], inputs: str, num_workers: int, tally: Tally) -> Generator[_Ended, None, None]:
        """As `_train_here`, but each group in a worker process of its own.

        A worker that dies, as one that the system ends for want of memory, is taken for out of memory the first time.
        """
        if self.config.trackers:
            self.open_trackers(self.config.expand_arms()).close()  # so that no two workers write trackers.json
        setup = {
            "run_dir": str(self.run_dir.path.resolve()),
            "cache_dir": str(self.cache_dir.resolve()),
            "inputs": inputs,
            "num_workers": num_workers,
        }
        mourned: set[str] = set()
        environments = worker_environments(self.device.type, num_workers)
        assert self.run_dir.lock_descriptor is not None
        with self._aside():
            for group, answer in run_side_by_side(
                todo,
                lambda group: (group.label, {"arms": group.names, "gradient_checkpointing": group.gradient_checkpointing}),
                "lorascope.study.serve_groups",
                setup,
                environments,
                [self.run_dir.lock_descriptor],
                tally,
            ):
                if answer.death is not None and mourned & set(group.names):
                    raise RunError(
                        f"the process that trained {', '.join(group.names)} {answer.death} again: if memory is short, set workers = 1 or "
                        "lower train.batch_size; the log of the system may say more"
                    )
                if answer.death is not None:
                    mourned |= set(group.names)
                yield group, f"its process {answer.death}" if answer.death else answer.value

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Within, the base does not hold the memory of a GPU that a worker needs."""
        models = [*self.base.components.values(), self.base.vae] if self.device.type == "cuda" else []
        for model in models:
            model.to("cpu")
        if models:
            torch.cuda.empty_cache()
        try:
            yield
        finally:
            for model in models:
                model.to(self.device)

    def _make_room(self, group: TrialGroup, lack: str) -> list[TrialGroup]:
        """What to go on with where a group ran out of memory."""
        if len(group.arms) > 1:
            parts = group.halves()
            shown = " and ".join(", ".join(part.names) for part in parts)
            log.warning("train    out of memory (%s): going on from the last checkpoint in passes of %s", lack, shown)
            return parts
        name, asked = group.arms[0].name, self.config.train.gradient_checkpointing
        if group.gradient_checkpointing or asked is not None:
            more = ", or set train.gradient_checkpointing = true" if asked is False else ""
            raise RunError(
                f"arm {name}: not enough memory for it alone ({lack}): in another folder, lower its batch_size "
                f"(train.accumulation_steps makes up for that) or data.resolution_px{more}"
            )
        log.warning("train    out of memory (%s): %s goes on from the last checkpoint with gradient checkpointing", lack, name)
        return [replace(group, gradient_checkpointing=True)]

    def _require_an_arm(self) -> None:
        """Raise `RunError` if all arms have failed."""
        failures = {arm.name: self._training(arm)["failed"] for arm in self.config.expand_arms()}
        if all(failures.values()):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
            raise RunError(f"no arm is left ({reasons}): lower arms.lr, or set train.precision = 'fp32'")

    def _idle_parts(self, train: Encoded) -> list[torch.nn.Module]:
        """What of the base training does not touch: the VAE unless it draws previews, the text encoder if all text states are kept."""
        if self.config.sample.preview_every_epochs:
            return []
        return [self.base.vae] if train.text_states is None else [self.base.vae, self.base.text_encoder]

    def _train_inputs(self) -> str:
        return digest_json(
            [
                self.config.digest("train", "arms", "adapter", "data"),
                self.dataset.summary["fingerprint"],
                self.base.digest,
                str(self.device),
                self.tuning.precision,
            ]
        )

    def _training(self, arm: Arm) -> dict[str, Any]:
        facts: dict[str, Any] = read_json(self.run_dir.adapters_dir / arm.name / "training.json")
        return facts

    def trained_arms(self) -> list[Arm]:
        """The arms that did not fail."""
        return [arm for arm in self.config.expand_arms() if self._training(arm)["failed"] is None]

    def load_bank(self, arms: Sequence[Arm]) -> AdapterBank:
        """The trained adapters of `arms` in one bank, not attached."""
        bank = AdapterBank(self.base.components, self.targets, arms)
        for index, arm in enumerate(arms):
            bank.load(index, load_adapter(self.run_dir.adapters_dir / arm.name))
        return bank

    # -- sample -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts of the study."""
        return load_prompts(self.config.sample.prompts, self.config.sample.num_prompts)

    def sample(self) -> None:
        """Draw every prompt with the base and every arm; writes `images/`."""
        inputs = digest_json([self._train_inputs(), self.config.digest("sample")])
        if self.run_dir.is_finished("sample", inputs):
            return
        section = self.config.sample
        arms = self.trained_arms()
        jobs = plan_jobs(self.prompts, section.seeds)
        shape = latent_shape_of(self.base, self.config.data.resolution_px)
        models = [("base", Slice(0, 0.0)), *((arm.name, Slice(index)) for index, arm in enumerate(arms))]
        bank = self.load_bank(arms).attach()
        try:
            with self._stage("sample", inputs) as note, track("sample", len(jobs) * len(models), "pictures") as task:
                draw_all(self.base, bank, models, jobs, shape, section, self._image_path, task.advance)
                note(pictures=len(jobs) * len(models))
        finally:
            bank.detach()
        log.info(
            "sample   pictures: %d; prompts: %d, seeds: %d, models with the base: %d",
            len(jobs) * len(models),
            len(self.prompts),
            len(section.seeds),
            len(models),
        )

    def _image_path(self, arm: str, job: Job) -> Path:
        return self.run_dir.images_dir / arm / job.file_name

    # -- merge --------------------------------------------------------------------------------------------------------

    def check_merge(self) -> None:
        """Compare merged with unmerged output for every arm; writes `merge_check.json`."""
        inputs = digest_json([self._train_inputs(), self.config.digest("sample"), "merge"])
        if self.run_dir.is_finished("merge_check", inputs):
            return
        arms, section = self.trained_arms(), self.config.sample
        job = plan_jobs(self.prompts, section.seeds)[0]
        shape = latent_shape_of(self.base, self.config.data.resolution_px)
        tolerance = MERGE_TOLERANCE[self.base.unet.dtype]
        results = {}
        with self._stage("merge_check", inputs):
            bank = self.load_bank(arms)
            for index, arm in enumerate(arms):
                bank.attach()
                pictures, latents = draw_pictures(self.base, bank, [Slice(index)], [job], shape, section)
                bank.detach()
                with merged_into(self.base, load_adapter(self.run_dir.adapters_dir / arm.name)):
                    idle = AdapterBank(self.base.components, self.targets[:1], [arm])  # strength 0: the merged weights alone
                    merged_pictures, merged_latents = draw_pictures(self.base, idle, [Slice(0, 0.0)], [job], shape, section)
                error = float((merged_latents - latents).norm() / latents.norm())
                results[arm.name] = {
                    "relative_error": error,
                    "tolerance": tolerance,
                    "mean_pixel_difference": float((merged_pictures.float() - pictures.float()).abs().mean()),
                    "ok": error <= tolerance,
                }
            write_json(self.run_dir.merge_check_json, results)
        log.info("merge    merged equals unmerged: %s", "yes" if all(item["ok"] for item in results.values()) else "NO")

    # -- score and report ---------------------------------------------------------------------------------------------

    def score(self) -> None:
        """CLIP similarity of every picture, and calibration rows; writes `scores.parquet`."""
        inputs = digest_json([self._train_inputs(), self.config.digest("sample", "score")])
        if self.run_dir.is_finished("score", inputs):
            return
        generated = []
        for arm in (None, *self.trained_arms()):
            for job in plan_jobs(self.prompts, self.config.sample.seeds):
                name = arm.name if arm else "base"
                path = self._image_path(name, job)
                if not path.exists():
                    raise StorageError(f"{path}: not there: run `lorascope sample {self.run_dir.path}` first")
                generated.append(
                    Generated(
                        arm=name,
                        rank=arm.rank if arm else 0,
                        alpha=arm.alpha if arm else None,
                        lr=arm.lr if arm else None,
                        training_seed=arm.seed if arm else None,
                        category=job.prompt.category,
                        prompt_index=job.prompt.index,
                        prompt=job.prompt.text,
                        seed=job.seed,
                        image=path.relative_to(self.run_dir.path).as_posix(),
                    )
                )
        with self._stage("score", inputs) as note:
            encoder = load_encoder(self.config.score, self.device)
            heldout = [(self.dataset.load_pixels(example), example.caption) for example in self.dataset.heldout[:50]]
            score_run(self.run_dir, self.config, encoder, generated, heldout, self.prompts)
            note(pictures=len(generated))
        log.info("score    %d pictures by %s", len(generated), self.config.score.model)

    def report(self) -> Report:
        """Write `report.html`, `report.md` and the figures from what the run folder holds."""
        started = time.perf_counter()
        self.run_dir.describe(finished=_now())
        report = build_report(self.run_dir)
        self.run_dir.finish("report", digest_json(self.run_dir.manifest()["stages"].get("score")), time.perf_counter() - started)
        return report

    def faults(self) -> list[str]:
        """Failed arms and merges beyond tolerance, a sentence each."""
        faults = []
        for arm in self.config.expand_arms():
            if (failure := self._training(arm)["failed"]) is not None:
                faults.append(f"arm {arm.name} failed: {failure}: lower its lr and run it in another folder")
        if self.run_dir.merge_check_json.exists():
            for name, result in read_json(self.run_dir.merge_check_json).items():
                if not result["ok"]:
                    faults.append(f"arm {name}: merged output differs by {result['relative_error']:.2g}, tolerance {result['tolerance']:g}")
        return faults

    def raise_faults(self) -> None:
        """Raise `RunError` if `faults` names any."""
        if faults := self.faults():
            raise RunError("; ".join(faults))


def _differences(old: Any, new: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves in which two configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [item for key in {**old, **new} for item in _differences(old.get(key), new.get(key), f"{place}.{key}".lstrip("."))]
    return [] if old == new else [(place, old, new)]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """The commit of the source checkout lorascope runs from, if it is one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def _device_facts(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"name": properties.name, "threads": torch.get_num_threads(), "memory_bytes": properties.total_memory}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"name": device_name(device), "threads": torch.get_num_threads(), "memory_bytes": memory}


def serve_groups() -> None:
    """Be a worker process of `Study.train`: train the groups that it gives."""

    def start(setup: dict[str, Any]) -> Callable[[dict[str, Any], Link], str | None]:
        log.setLevel(logging.WARNING)  # what is said of the base and the encoded pictures was said by the parent
        run_dir = Path(setup["run_dir"])
        config = load_study(run_dir / "study.toml", environment={})
        study = Study(config, run_dir, Path(setup["cache_dir"]))
        if study.device.type == "cpu":
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        arms = {arm.name: arm for arm in config.expand_arms()}
        _ = study.encoded, study.targets
        log.setLevel(logging.DEBUG)

        def train_group(task: dict[str, Any], link: Link) -> str | None:
            group = TrialGroup(tuple(arms[name] for name in task["arms"]), task["gradient_checkpointing"])
            with study.open_trackers(group.arms) as trackers:
                return study.train_group(group, setup["inputs"], setup["num_workers"], trackers, link, link.is_stopped)

        return train_group

    serve(start)
