"""A study: its stages run in order in a run folder.

Every stage can be called alone and again; what is finished for the same inputs is skipped.
"""

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorascope import __version__
from lorascope.adapters.bank import Slice
from lorascope.adapters.files import load_adapter
from lorascope.adapters.mixed import Bank, open_bank
from lorascope.adapters.schedule import schedule_of
from lorascope.adapters.targets import Target, resolve_section
from lorascope.arms import Arm
from lorascope.base.configs import count_tokens, load_tokenizer, read_configs
from lorascope.base.loading import Base, load_base
from lorascope.config import load_study
from lorascope.console import duration, log, log_to_file, progress_to_file, track
from lorascope.data.dataset import Dataset, load_dataset, prepare_data
from lorascope.data.encoding import Encoded, default_cache_dir, encode_dataset
from lorascope.diagnosis.finished import Finished
from lorascope.diagnosis.stage import diagnose
from lorascope.doctor.examination import Subject, recall_or_examine
from lorascope.errors import ConfigError, RunError, StorageError
from lorascope.evaluation.features import check_encoder, check_style_encoder, load_encoder, load_style_encoder
from lorascope.evaluation.merging import compare_merged
from lorascope.evaluation.prompts import OWN_CAPTIONS, Prompt, check_prefix, describe_cut, load_prompts
from lorascope.evaluation.sampling import Job, draw_all, latent_shape_of, plan_jobs
from lorascope.evaluation.scoring import MAX_REAL, list_pictures, score_run
from lorascope.evaluation.sweep_rows import Epoch
from lorascope.evaluation.tries import (
    Try,
    checked_prompt,
    checked_settings,
    folder_of,
    note_try,
    plan_pictures,
)
from lorascope.inputs import (
    data_inputs,
    diagnose_inputs,
    encode_inputs,
    freeze,
    merge_inputs,
    require_apart,
    require_same_data,
    sample_inputs,
    score_inputs,
    train_inputs,
)
from lorascope.machine.arithmetic import full_fp32
from lorascope.machine.device import choose_device
from lorascope.machine.facts import device_facts, now, software_versions, source_commit
from lorascope.machine.fast_paths import ALL_PATHS, FastPaths
from lorascope.machine.memory import free_cached
from lorascope.report.faults import find_faults
from lorascope.report.page import Report, build_report
from lorascope.run_folder import RunDir
from lorascope.schema import StudyConfig
from lorascope.store import access_errors, digest_json, write_json
from lorascope.training.optimizers import check_optimizer
from lorascope.training.stage import Material, Training, serve_material
from lorascope.training.trackers import require_trackers
from lorascope.training.tuning import Tuning, study_workload, tune

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "scipy",
    "pillow",
    "pyarrow",
    "pydantic",
    "matplotlib",
)


class Study:
    """One study in its run folder."""

    def __init__(self, config: StudyConfig, run_dir: Path | str, cache_dir: Path | None = None) -> None:
        self.config = config
        self.run_dir = RunDir(Path(run_dir))
        self._is_reader = False  # whether what is found goes into no manifest
        self.cache_dir = cache_dir or default_cache_dir()
        self.device = choose_device(config.device)

    @classmethod
    @access_errors(ConfigError)
    def open(cls, run_dir: Path | str, cache_dir: Path | None = None) -> "Study":
        """The study of an existing run folder; raise `ConfigError` if it holds none."""
        study_toml = Path(run_dir) / "study.toml"
        if not study_toml.is_file():
            raise ConfigError(
                f"{run_dir}: no study.toml here: name a run folder, or start one with `lorascope study`"
            )
        return cls(load_study(study_toml, environment={}), run_dir, cache_dir)

    def run(self, command: str = "lorascope.Study.run()") -> Report:
        """All stages, then the report.

        Raises `RunError` at the end when an arm failed or merged and unmerged outputs differ; everything else
        is done and kept by then.
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
            if self.config.diagnose.enabled:
                self.diagnose()
            return self.report()

    def check_inputs(self) -> None:
        """Fail on prompts, scorer or adapter targets that cannot be used now rather than after hours of
        training.
        """
        section = self.config.sample
        # The pictures' own captions are known, and were looked at, only once the pictures are.
        own = section.prompts == OWN_CAPTIONS
        prompts = load_prompts(section.prompts, section.num_prompts) if own else self.prompts
        log.debug("prompts  %d", len(prompts))
        check_optimizer(self.config)
        require_trackers(self.config.trackers)
        check_encoder(self.config.score)
        check_style_encoder(self.config.score)
        log.debug("targets  %d modules", len(self.targets))
        tokenizer, prefix = self.base.tokenizer, section.prompt_prefix or ""
        count = functools.partial(count_tokens, tokenizer)
        texts = [prefix + prompt.text for prompt in prompts]
        if words := describe_cut(texts, count, tokenizer.model_max_length):
            log.warning("prompts  %s", words)

    @contextmanager
    def working(self, command: str) -> Iterator[None]:
        """Hold the run folder, freeze the configuration in it, and log to it."""
        require_apart(self.run_dir, self.config)
        with access_errors(StorageError), self.run_dir.lock():
            freeze(self.run_dir, self.config)
            with log_to_file(self.run_dir.log_path), progress_to_file(self.run_dir.progress_json):
                self._describe(command)
                yield

    def _describe(self, command: str) -> None:
        facts = self.run_dir.manifest()
        self.run_dir.describe(
            lorascope=__version__,
            versions=software_versions(_PACKAGES),
            commit=source_commit(),
            device=device_facts(self.device),
            command=facts.get("command", command),
            started=facts.get("started", now()),
            config_digest=self.config.digest(),
        )

    @functools.cached_property
    def fast_paths(self) -> FastPaths:
        """What may be used on this device: on a GPU all that was not found wrong there, at this start if
        there was none before with these versions. On a CPU, which has no such paths, nothing is checked.
        """
        if self.device.type != "cuda":
            return ALL_PATHS
        section, config = self.config.base, self.config
        subject = Subject(section, self.device, config.train.precision, config.data.resolution_px)
        examination = recall_or_examine(subject)
        for finding in examination.barred:
            log.warning("doctor   %s: not used in this run", finding.as_line())
        return examination.fast_paths

    @functools.cached_property
    def tuning(self) -> Tuning:
        """What is fastest here for the run's own shapes; a run folder keeps the precision it began with, and
        on one device all of it.
        """
        configs = read_configs(self.config.base)
        workload = study_workload(self.config, configs)
        kept = self.run_dir.manifest().get("tuning")
        precision = self.config.train.precision
        tuning = tune(configs["unet"], workload, self.device, precision, kept, self.fast_paths)
        if tuning.to_json() != kept:
            self._note(tuning=tuning.to_json())
        for note in (f"U-Net in {tuning.precision}", *tuning.notes):
            log.info("tuning   %s", note)
        return tuning

    @functools.cached_property
    def base(self) -> Base:
        """The frozen base, loaded at first use."""
        base = load_base(self.config.base, self.device, self.tuning.precision)
        base = replace(base, half_vae=self.fast_paths.half_vae)
        self.tuning.apply(base.unet)
        shown = base.describe()
        log.info(
            "base     %s (%s): U-Net %.1f M, VAE %.1f M, text encoder %.1f M parameters; %s, predicts "
            "%s; digest %s",
            self.config.base.model,
            base.source,
            *(shown["parameters"][part] / 1e6 for part in ("unet", "vae", "text_encoder")),
            shown["dtype"],
            base.prediction_type,
            base.digest[:12],
        )
        self._note(base={**shown, "model": self.config.base.model})
        return base

    @functools.cached_property
    def targets(self) -> list[Target]:
        """The adapted layers."""
        targets = resolve_section(self.base.components, self.config.adapter, self.config.expand_arms())
        names = [
            *self.config.adapter.targets,
            *(name for group in self.config.adapter.groups for name in group.targets),
        ]
        self._note(adapter={"modules": len(targets), "targets": names})
        return targets

    def _note(self, **facts: Any) -> None:
        """Set facts of the manifest, unless another process may work in the folder."""
        if not self._is_reader:
            self.run_dir.describe(**facts)

    @contextmanager
    def _stage(self, name: str, inputs: str) -> Iterator[Callable[..., None]]:
        """Time a stage and record its end with the facts given to the yielded function."""
        facts: dict[str, Any] = {}
        started = time.perf_counter()
        yield facts.update
        self.run_dir.finish(name, inputs, time.perf_counter() - started, **facts)

    # -- data ------------------------------------------------------------------------------------------------

    def prepare_data(self) -> Dataset:
        """Check the pictures and captions, find duplicates, split; writes `data.json`."""
        inputs = data_inputs(self.config)
        if self.run_dir.is_finished("data", inputs) and self.run_dir.data_json.exists():
            return self.dataset
        tokenizer = load_tokenizer(self.config.base)
        with self._stage("data", inputs) as note:
            with track("data", 1, "pictures") as task:

                def show(done: int, total: int) -> None:
                    task.set_total(total)
                    task.advance(done - task.completed)

                dataset = prepare_data(
                    self.config.data,
                    functools.partial(count_tokens, tokenizer),
                    tokenizer.model_max_length,
                    show,
                )
            require_same_data(self.run_dir, self.config, dataset.summary["fingerprint"])
            write_json(self.run_dir.data_json, dataset.summary)
            note(fingerprint=dataset.summary["fingerprint"])
        summary, num_train = dataset.summary, len(dataset.train)
        seen = sum(example.repeats for example in dataset.train)
        log.info(
            "data     %d pictures to train on%s, %d held out; %d refused, %d treated; groups of "
            "duplicates: %d (data.json lists them)",
            num_train,
            f", {seen:,} an epoch with repeats" if seen > num_train else "",
            len(dataset.heldout),
            len(summary["refused"]),
            len(summary["treated"]),
            len(summary["duplicates"]),
        )
        return dataset

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The pictures of the run, from `data.json`."""
        return load_dataset(self.config.data, self.run_dir.data())

    # -- encode ----------------------------------------------------------------------------------------------

    def encode(self) -> tuple[Encoded, Encoded]:
        """Train and held-out pictures as latents and text states, from the cache where they are in it."""
        return self.encoded

    @functools.cached_property
    def encoded(self) -> tuple[Encoded, Encoded]:
        """Encoded train and held-out pictures."""
        dataset = self.dataset
        inputs = encode_inputs(dataset.summary["fingerprint"], self.base.digest)
        started = time.perf_counter()
        with track("encode", len(dataset.train) + len(dataset.heldout), "pictures") as task:
            section = self.config.data
            keeps_text = not (
                section.shuffle_tags or any(target.component == "text_encoder" for target in self.targets)
            )
            train, heldout, num_encoded = encode_dataset(
                dataset,
                self.base,
                self.cache_dir,
                flip=section.flip,
                keep_text=keeps_text,
                progress=task.advance,
            )
        seconds = time.perf_counter() - started
        rate = f"{num_encoded:,} pictures in {duration(seconds)}, {num_encoded / seconds:.0f} pictures/s"
        log.info("encode   %s", rate if num_encoded else "all in the cache")
        if not self.run_dir.is_finished("encode", inputs):
            self.run_dir.finish("encode", inputs, seconds, encoded=num_encoded)
        return train, heldout

    # -- train -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train all arms, in groups that share one pass, some side by side; writes `adapters/`, `groups.json`
        and `metrics.jsonl`.

        Raises `RunError` where an arm alone does not fit into memory, and where no arm is left.
        """
        inputs = self._train_inputs()
        if self.run_dir.is_finished("train", inputs):
            return
        with self._stage("train", inputs) as note:
            plan = Training(self.material).run()
            note(side_by_side=plan.num_workers, passes=[group.names for group in plan.groups])

    @property
    def material(self) -> Material:
        """What the arms are trained from."""
        train, heldout = self.encoded
        cuda_graph = self.config.train.cuda_graph and self.fast_paths.recorded_step
        section = self.config.train.model_copy(update={"cuda_graph": cuda_graph})
        parts = (
            self.config.model_copy(update={"train": section}),
            self.run_dir,
            self.cache_dir,
            self.base,
            self.targets,
            train,
            heldout,
            self.prompts,
        )
        return Material(*parts, inputs=self._train_inputs())

    def _train_inputs(self) -> str:
        return train_inputs(
            self.config,
            self.dataset.summary["fingerprint"],
            self.base.digest,
            str(self.device),
            self.tuning.precision,
        )

    def trained_arms(self) -> list[Arm]:
        """The arms that did not fail; raises `StorageError` where an adapter was changed after training."""
        arms = [arm for arm in self.config.expand_arms() if self.run_dir.failure(arm.name) is None]
        for arm in arms:
            self.run_dir.require_unchanged(arm.name)
        return arms

    def load_bank(self, arms: Sequence[Arm], base: Base, epoch: Epoch = "last") -> Bank:
        """The trained adapters of `arms` in one bank on `base`, not attached."""
        bank = open_bank(base.components, self.targets, arms)
        for index, arm in enumerate(arms):
            folder = self.run_dir.adapters_dir / arm.name
            bank.load(index, load_adapter(folder / "best" if epoch == "best" else folder))
        return bank

    # -- sample ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts of the study, without `sample.prompt_prefix`, which is looked at too."""
        section = self.config.sample
        captions = None
        if section.prompts == OWN_CAPTIONS:
            captions = [
                [example.caption for example in part] for part in (self.dataset.train, self.dataset.heldout)
            ]
        prompts = load_prompts(section.prompts, section.num_prompts, captions)
        check_prefix(section.prompt_prefix or "", prompts)
        return prompts

    def sample(self) -> None:
        """Draw every prompt with the base and every arm; writes `images/`."""
        inputs = sample_inputs(self.config, self._train_inputs())
        section = self.config.sample
        jobs = plan_jobs(self.prompts, section.seeds)
        if self.run_dir.is_finished("sample", inputs) and not self._missing_pictures(jobs):
            return
        arms = self.trained_arms()
        shape = latent_shape_of(self.base, self.config.data.resolution_px)

        def image_path(model: str, job: Job) -> Path:
            return self.run_dir.image_path(model, job.file_name)

        models = [("base", Slice(0, 0.0)), *((arm.name, Slice(index)) for index, arm in enumerate(arms))]
        bank = self.load_bank(arms, self.base).attach()
        try:
            with (
                self._stage("sample", inputs) as note,
                track("sample", len(jobs) * len(models), "pictures") as task,
            ):
                draw_all(self.base, bank, models, jobs, shape, section, image_path, task.advance)
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

    def _missing_pictures(self, jobs: Sequence[Job]) -> bool:
        """Whether a picture of the sample stage is not there (any more)."""
        names = [arm.name for arm in self.config.expand_arms() if self.run_dir.failure(arm.name) is None]
        return not all(
            self.run_dir.image_path(name, job.file_name).exists() for name in ("base", *names) for job in jobs
        )

    # -- prompts of one's own --------------------------------------------------------------------------------

    def draw(
        self,
        prompt: str,
        arms: Sequence[str] | None = None,
        strengths: Sequence[float] = (1.0,),
        seed: int = 0,
        epoch: Epoch = "last",
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Try:
        """Draw a prompt with the base and with arms at any strengths, all from the same initial noise; `arms`
        are all that were trained where none are named.

        Once training has ended it can be called while other stages work in the folder: it writes in `tries/`
        alone. Pictures that are there stay. Raises `ConfigError` for a prompt, arm, strength or setting that
        cannot be drawn and where no training has ended, and otherwise as `sampling.draw_all` does.
        """
        text, section = checked_prompt(prompt), checked_settings(self.config.sample, steps, guidance)
        chosen = self._arms_to_draw(arms, epoch)
        pictures = plan_pictures([arm.name for arm in chosen], epoch, strengths)
        self._is_reader = True
        job = Job(Prompt("own", 0, text), seed)
        folder = folder_of(self.run_dir, text, seed, section)
        shape = latent_shape_of(self.base, self.config.data.resolution_px)
        places = {arm.name: index for index, arm in enumerate(chosen)}
        todo = {drawn.name: drawn for drawn in pictures if not (folder / drawn.picture).exists()}
        models = [(name, Slice(places.get(drawn.arm, 0), drawn.strength)) for name, drawn in todo.items()]

        def path_of(name: str, job: Job) -> Path:
            return folder / todo[name].picture

        if words := describe_cut(
            [(section.prompt_prefix or "") + text],
            functools.partial(count_tokens, self.base.tokenizer),
            self.base.tokenizer.model_max_length,
        ):
            log.warning("prompts  %s", words)
        with access_errors(StorageError), track("draw", len(pictures), "pictures") as task:
            task.advance(len(pictures) - len(models))
            if models:
                bank = self.load_bank(chosen, self.base, epoch).attach()
                try:
                    draw_all(self.base, bank, models, [job], shape, section, path_of, task.advance)
                finally:
                    bank.detach()
        made = Try(folder.name, text, seed, section.steps, section.guidance, now(), tuple(pictures))
        return note_try(folder, made)

    def _arms_to_draw(self, names: Sequence[str] | None, epoch: Epoch) -> list[Arm]:
        """The arms of these names, in the study's order; raise `ConfigError` where one cannot be drawn."""
        run = self.run_dir
        if "train" not in run.manifest()["stages"]:
            raise ConfigError(
                f"{run.path}: no training has ended here: run `lorascope train {run.path}` first"
            )
        known = {arm.name: arm for arm in self.config.expand_arms()}
        for name in names or ():
            if name not in known:
                raise ConfigError(
                    f"--arm {name[:80]}: is no arm of this study: name one of {', '.join(known)}"
                )
            if reason := run.failure(name):
                raise ConfigError(f"--arm {name}: its training failed ({reason}): name another arm")
        wanted = set(names or [name for name in known if run.failure(name) is None])
        arms = [arm for name, arm in known.items() if name in wanted]
        for arm in arms:
            run.require_unchanged(arm.name)
            if epoch == "best" and run.training(arm.name).get("best") is None:
                raise ConfigError(
                    f"--checkpoint best: {arm.name} has none, for want of held-out pictures: leave it out"
                )
        return arms

    # -- merge -----------------------------------------------------------------------------------------------

    def check_merge(self) -> None:
        """Compare merged with unmerged output for every arm; writes `merge_check.json`."""
        inputs = merge_inputs(self.config, self._train_inputs())
        if self.run_dir.is_finished("merge_check", inputs) and self.run_dir.merge_check_json.exists():
            return
        # T-LoRA has no merged weights.
        arms = [arm for arm in self.trained_arms() if schedule_of(arm) is None]
        section = self.config.sample
        job = plan_jobs(self.prompts, section.seeds)[0]
        shape = latent_shape_of(self.base, self.config.data.resolution_px)
        with self._stage("merge_check", inputs), full_fp32():
            free_cached(self.base.device)
            base = self.base.in_fp32()
            bank = self.load_bank(arms, base) if arms else None
            folders = {arm.name: self.run_dir.adapters_dir / arm.name for arm in arms}
            results = compare_merged(base, bank, folders, job, shape, section) if bank else {}
            write_json(self.run_dir.merge_check_json, results)
        answer = "yes" if all(item["ok"] for item in results.values()) else "NO"
        log.info("merge    merged equals unmerged: %s", answer if results else "no arm can be merged")

    # -- score -----------------------------------------------------------------------------------------------

    def score(self) -> None:
        """CLIP similarity of every picture, and calibration rows; writes `scores.parquet`."""
        inputs = score_inputs(self.config, self._train_inputs())
        if self.run_dir.is_finished("score", inputs) and self.run_dir.scores_parquet.exists():
            return
        jobs = plan_jobs(self.prompts, self.config.sample.seeds)
        generated = list_pictures(self.run_dir, self.trained_arms(), jobs)
        with self._stage("score", inputs) as note:
            encoder = load_encoder(self.config.score, self.device)
            heldout = [
                (self.dataset.load_pixels(example), example.caption)
                for example in self.dataset.heldout[:MAX_REAL]
            ]
            score_run(self.run_dir, self.config, encoder, generated, heldout, self.prompts)
            note(pictures=len(generated))
        log.info("score    %d pictures by %s", len(generated), self.config.score.model)

    # -- diagnose and report ---------------------------------------------------------------------------------

    def diagnose(self) -> None:
        """Find why each arm wins or fails: what it draws at several strengths, its losses, weights and files;
        writes `sweep/`, `sweep.parquet`, `copying/`, `copying.json` and `diagnosis.json`.
        """
        inputs, run = diagnose_inputs(self.config, self._train_inputs()), self.run_dir
        written = run.sweep_parquet.exists() and run.diagnosis_json.exists()
        if run.is_finished("diagnose", inputs) and written:
            return
        train, heldout = self.encoded
        shown = self.dataset.heldout[:MAX_REAL]
        seen = self.dataset.train[: len(shown)]
        finished = Finished(
            config=self.config,
            run=self.run_dir,
            base=self.base,
            targets=self.targets,
            arms=self.trained_arms(),
            prompts=self.prompts,
            train=train,
            heldout=heldout,
            train_pictures=[self.dataset.load_pixels(example) for example in seen],
            heldout_pictures=[self.dataset.load_pixels(example) for example in shown],
        )
        with self._stage("diagnose", inputs) as note:
            encoder = load_encoder(self.config.score, self.device)
            style_encoder = load_style_encoder(self.config.score, self.device)
            found = diagnose(finished, encoder, software_versions(_PACKAGES), style_encoder)
            note(pictures=sum(part.num_pictures for part in finished.parts))
        for arm, diagnosis in found.items():
            log.info("diagnose %s: %s", arm, diagnosis.as_line())

    def report(self) -> Report:
        """Write `report.html`, `report.md` and the figures from what the run folder holds."""
        started = time.perf_counter()
        self.run_dir.describe(finished=now())
        report = build_report(self.run_dir)
        self.run_dir.finish(
            "report",
            digest_json([self.run_dir.manifest()["stages"].get(stage) for stage in ("score", "diagnose")]),
            time.perf_counter() - started,
        )
        return report

    def raise_faults(self) -> None:
        """Raise `RunError` if an arm failed or a merge differs beyond tolerance."""
        if faults := find_faults(self.run_dir, (arm.name for arm in self.config.expand_arms())):
            raise RunError("; ".join(faults))


def serve_groups() -> None:
    """Be a worker process of a study's training."""

    def prepare(setup: dict[str, Any]) -> Material:
        log.setLevel(
            logging.WARNING
        )  # what is said of the base and the encoded pictures was said by the parent
        study = Study.open(Path(setup["run_dir"]), Path(setup["cache_dir"]))
        if study.device.type == "cpu":
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        material = study.material
        log.setLevel(logging.DEBUG)
        return material

    serve_material(prepare)
