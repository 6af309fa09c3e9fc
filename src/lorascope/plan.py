"""What a study would do, from its configuration alone: arms, steps, pictures, memory, rough time and disk."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorascope.adapters.targets import count_parameters
from lorascope.console import duration, size
from lorascope.data.captions import check_additions
from lorascope.data.sources import count_repeats
from lorascope.diagnosis.losses import MAX_PICTURES, NUM_DRAWINGS
from lorascope.evaluation.prompts import Prompt, check_prefix, load_prompts
from lorascope.evaluation.statistics import smallest_detectable_effect
from lorascope.evaluation.sweep import Part, plan_edits, plan_sweep
from lorascope.machine.device import choose_device
from lorascope.machine.memory import free_bytes
from lorascope.machine.speed import matmul_flops
from lorascope.schema import StudyConfig
from lorascope.sections import DataSection, SampleSection
from lorascope.training.footprint import Estimate
from lorascope.training.group import section_of
from lorascope.training.optimizers import check_optimizer
from lorascope.training.packing import TRAIN_TO_FORWARD_FLOPS, ArmGroup, Packing, describe_passes
from lorascope.training.passes import Counts, count_models, pass_memory, plan_passes
from lorascope.training.probe import NUM_BANDS
from lorascope.training.trackers import require_trackers
from lorascope.training.trainer import count_steps

_CHECKPOINTING_FLOPS = 1.46  # a second forward pass: (2.17 + 1) / 2.17
# Share of a matrix product's speed that U-Nets reach. On a CPU of the fp32 product: the pocket study in bf16
# on two cores of an AMD EPYC trained at 0.46 and drew at 0.88 of it. Of GPUs a guess.
_EFFICIENCY = {"cpu": 0.4, "cuda": 0.3, "mps": 0.25}


# Standard deviations of differences between arms in CLIP score: between prompts, each drawn from one and from
# several sampling seeds, and between training seeds (EXPERIMENTS.md, how far scores of the pocket world
# spread). Of other scorers only what was published for Stable Diffusion v1.5 is known, pictures of one arm;
# between training seeds they are taken to spread in the pocket world's proportion.
_POCKET_STDS, _OTHER_STDS = (21.0, 15.0, 2.0), (3.2, 3.2, 0.3)
_OTHER_SOURCE = "between prompts as published for SD v1.5, between seeds in the pocket world's proportion"


@dataclass(frozen=True)
class Power:
    """What the scores could show, with the spreads assumed for that: standard deviations in CLIP points of
    differences between arms.
    """

    num_prompts: int
    num_sampling_seeds: int
    num_training_seeds: int  # of the setting with the fewest
    prompt_std: float
    seed_std: float  # 0 with one training seed: the files themselves are compared
    source: str  # of the two
    smallest_difference: float  # that would be seen, in CLIP points, with 80 % power at two-sided 5 %

    def as_lines(self) -> list[str]:
        """The lines of a plan."""
        shown = (
            f"differences of {self.smallest_difference:.1f} CLIP points or more would be seen in "
            f"{self.num_prompts:,} prompts"
        )
        spread = f"{self.prompt_std:g} points between prompts"
        if self.num_training_seeds > 1:
            lines = [f"power      {shown} and {self.num_training_seeds:,} training seeds"]
            spread += f", {self.seed_std:g} between seeds"
        else:
            lines = [
                "power      one training seed: rank cannot be separated from luck (give arms several seeds);"
            ]
            lines += [f"           between these very files {shown}"]
        return [
            *lines,
            f"           in 80 % of studies like this one; assumed is a spread of {spread},",
            f"           {self.source}",
        ]


@dataclass(frozen=True)
class Plan:
    """The plan of a study; what is not known before the data is read is None."""

    name: str
    base: str
    arms: list[dict[str, Any]]  # every choice of each arm, with its scale, gain and number of parameters
    modules: int
    num_train: int | None
    repeats: dict[int, int]  # pictures by the times an epoch shows them, of a folder on this machine
    remarks: list[str]  # on that folder
    accumulation_steps: int
    steps: int | None  # of the arm with the most
    passes: list[list[str]]  # names of the arms that are trained together
    side_by_side: int  # passes at the same time
    pictures: int  # of the sample stage
    diagnosis_pictures: int  # at most, since an arm's best epoch may be its last
    diagnosis_steps: int
    diagnosis_share: float | None  # of what is to compute, at most
    sampling_share: float | None  # of what is to compute, previews among it
    denoising_steps: int
    guidance: float
    power: Power
    memory: Estimate  # of the pass that takes the most
    memory_bytes: int  # what training takes with the base at its peak, on one GPU or of the machine
    free_bytes: int  # now
    estimated_s: float | None
    estimated_bytes: int

    def as_text(self) -> str:
        """The plan for people, several lines."""
        known = self.estimated_s is not None
        time = f"about {duration(self.estimated_s or 0)} (rough)" if known else "known once the data is read"
        lines = [
            f"study {self.name}: {len(self.arms)} arms on {self.base}, {self.modules} adapted layers",
            *self._arm_lines(),
            *self._training_lines(),
            f"sampling   {self.pictures:,} pictures, {self.denoising_steps} steps, "
            f"guidance {self.guidance:g}",
        ]
        if self.diagnosis_pictures:
            part = self.diagnosis_share
            share = "" if part is None else f", and losses: {100 * part:.0f} % of the time below"
            lines.append(
                f"diagnosis  at most {self.diagnosis_pictures:,} pictures at several strengths, "
                f"{self.diagnosis_steps} steps{share}"
            )
        lines += [
            *self.power.as_lines(),
            *self._memory_lines(),
            f"time       {time}",
            f"disk       about {size(self.estimated_bytes)}",
        ]
        return "\n".join(lines)

    @property
    def _lengths_vary(self) -> bool:
        """Whether arms differ in batch size or epochs."""
        return len({(arm["batch_size"], arm["epochs"]) for arm in self.arms}) > 1

    def _arm_lines(self) -> list[str]:
        """A line for every arm: its choices, as far as they may differ, and its parameters."""
        width = max(16, *(len(arm["name"]) for arm in self.arms))
        vary, matched = self._lengths_vary, any(arm["match_gain"] for arm in self.arms)
        lines = []
        for arm in self.arms:
            count = arm["parameters"]
            parameters = f"{count:,} parameters, {size(4 * count)}"
            factors = f"rank {arm['rank']:<4} alpha {arm['alpha']:<6g} scale {arm['scale']:<6g}"
            if arm["kind"] == "full":
                factors = f"{'all weights':<{len(factors)}}"
            choices = f"{factors} lr {arm['lr']:<8g} seed {arm['seed']}"
            choices += f"  batch {arm['batch_size']:<3} epochs {arm['epochs']:<3}" if vary else ""
            choices += f"  gain {arm['gain']:<8.3g}" if matched else ""
            choices += "" if arm["kind"] == "lora" else f"  {arm['kind']}"
            choices += "" if list(arm["layers"]) == ["*"] else f" of {', '.join(arm['layers'])}"
            choices += "" if arm["min_rank"] is None else f" from rank {arm['min_rank']}"
            choices += "  rslora" if arm["scaling"] == "rslora" else ""
            choices += f"  {arm['init']}" if arm["init"] != "kaiming" else ""
            choices += f"  lr ratio {arm['lr_ratio']:g}" if arm["lr_ratio"] != 1 else ""
            choices += f"  rank dropout {arm['rank_dropout']:g}" if arm["rank_dropout"] else ""
            most = arm["max_weight_norm"]
            choices += "" if most is None else f"  norm at most {most:g}"
            lines.append(f"  {arm['name']:<{width}} {choices}  {parameters}")
        return lines

    def _training_lines(self) -> list[str]:
        """Pictures, epochs, batches and steps, what is known of the data, and which arms share a pass."""
        shown = f"at most {self.num_train:,} pictures" if self.num_train else "all pictures of the source"
        steps = f"{self.steps:,} steps" if self.steps else "steps known once the data is read"
        batch = f"{self.arms[0]['epochs']} epochs, batch {self.arms[0]['batch_size']}"
        if self._lengths_vary:
            steps = f"at most {steps}" if self.steps else steps
            batch = "epochs and batch of each arm"
        batch += f" x {self.accumulation_steps}" if self.accumulation_steps > 1 else ""
        lines = [f"training   {shown} x {batch}: {steps}"]
        if set(self.repeats) - {1}:
            times = ", ".join(
                f"{count:,} pictures {number} times" if number > 1 else f"{count:,} once"
                for number, count in self.repeats.items()
            )
            lines.append(f"repeats    an epoch shows {times}")
        lines += [f"data       {remark}" for remark in self.remarks]
        lines += [f"           {line}" for line in describe_passes(self.passes, self.side_by_side)]
        return lines

    def _memory_lines(self) -> list[str]:
        """What training takes beside what is free, and what to do where it is more."""
        lines = [
            f"memory     about {size(self.memory_bytes)} in training, {size(self.free_bytes)} are free; "
            f"the base takes {size(self.memory.weights_bytes)}, and",
            f"           a pass at most {self.memory.as_text()}",
        ]
        if self.memory_bytes > self.free_bytes:
            lines.append(
                "           it will probably not fit: lower batch_size (train.accumulation_steps makes "
                "up for it) or data.resolution_px"
            )
        return lines


def plan_study(config: StudyConfig) -> Plan:
    """The plan behind `--dry-run`: loads no weights, downloads nothing.

    Time is FLOPs counted on a model without weights, at a fixed share of the speed of a timed matrix product.
    Raises `ConfigError` for an optimizer or tracker with which the study would not start, and `DataError` for
    prompts, texts before prompts or captions, or a folder of pictures with which it would not.
    """
    check_optimizer(config)
    require_trackers(config.trackers)
    arms, sample = config.expand_arms(), config.sample
    prompts = load_prompts(sample.prompts, sample.num_prompts)
    check_prefix(sample.prompt_prefix or "", prompts)
    check_additions(config.data)
    num_pictures = len(prompts) * len(sample.seeds) * (len(arms) + 1)
    diagnosis = _plan_diagnosis(config, prompts)
    num_diagnosed = sum(part.num_pictures for part in diagnosis)
    device = choose_device(config.device)
    repeats, remarks = count_repeats(config.data)
    num_train, entries = _count_entries(config.data, repeats)
    steps = [count_steps(section_of(config, ArmGroup((arm,))), entries) for arm in arms] if entries else None
    models = count_models(config)
    passes = plan_passes(config, device, models, entries)
    free = free_bytes(device)
    estimates = [
        pass_memory(config, device, models, group.arms, passes.num_workers, free)[0]
        for group in passes.groups
    ]
    largest = max(estimates, key=lambda estimate: estimate.training_bytes)
    num_sampled = num_pictures + _num_previews(config)
    work, seconds = None, None
    if steps is not None:
        work = (
            _training_flops(config, models, steps, num_train or 0, largest.checkpointing),
            num_sampled * _drawing_flops(config.sample, models.flops),
            _diagnosis_flops(config, models.flops, diagnosis, num_train or 0, sum(repeats.values())),
        )
        seconds = sum(work) / (_flop_rate(device, torch.get_num_threads()) * _EFFICIENCY[device.type])
    counts = [count_parameters(models.targets, arm) for arm in arms]
    return Plan(
        name=config.name,
        base=config.base.model,
        arms=[
            {**arm.model_dump(), "scale": arm.scale, "gain": arm.gain, "parameters": count}
            for arm, count in zip(arms, counts, strict=True)
        ],
        modules=len(models.targets),
        num_train=num_train,
        repeats=repeats,
        remarks=remarks,
        accumulation_steps=config.train.accumulation_steps,
        steps=max(steps) if steps else None,
        passes=[group.names for group in passes.groups],
        side_by_side=passes.num_workers,
        pictures=num_pictures,
        diagnosis_pictures=num_diagnosed,
        diagnosis_steps=config.diagnose.steps,
        diagnosis_share=None if work is None else work[2] / sum(work),
        sampling_share=None if work is None else work[1] / sum(work),
        denoising_steps=sample.steps,
        guidance=sample.guidance,
        power=_power(config, len(prompts)),
        memory=largest,
        memory_bytes=largest.total_bytes * (1 if device.type == "cuda" else passes.num_workers),
        free_bytes=free,
        estimated_s=seconds,
        estimated_bytes=_disk_bytes(config, passes, counts, num_train or 0, num_sampled + num_diagnosed),
    )


def _count_entries(section: DataSection, repeats: Mapping[int, int]) -> tuple[int | None, int | None]:
    """Pictures to train on, at most, and how many an epoch shows; None where that is not known before the
    source is read. `repeats` are the pictures of a folder on this machine by their number of repeats: some of
    them will be held out, which ones is not known yet.
    """
    there, shown = sum(repeats.values()), sum(times * count for times, count in repeats.items())
    if not there:
        num_train = section.num_train
        return num_train, num_train * section.repeats if num_train else None
    num_train = min(section.num_train or there, there)
    return num_train, max(1, round(shown * num_train / there))


@functools.cache  # of a process: many plans may be made in one
def _flop_rate(device: torch.device, _num_threads: int) -> float:
    """FLOP/s of a matrix product in the dtype of training, timed."""
    return matmul_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32, repeats=2)


def _power(config: StudyConfig, num_prompts: int) -> Power:
    """What the scores could show, by the spreads known for the study's scorer."""
    seeds = min(Counter(arm.but_seed for arm in config.expand_arms()).values())
    is_pocket = config.score.model == "pocket"
    one, several, between_seeds = _POCKET_STDS if is_pocket else _OTHER_STDS
    prompt_std = one if len(config.sample.seeds) == 1 else several
    seed_std = between_seeds if seeds > 1 else 0.0
    return Power(
        num_prompts=num_prompts,
        num_sampling_seeds=len(config.sample.seeds),
        num_training_seeds=seeds,
        prompt_std=prompt_std,
        seed_std=seed_std,
        source="as measured on the pocket world" if is_pocket else _OTHER_SOURCE,
        smallest_difference=smallest_detectable_effect(prompt_std, num_prompts, seed_std, seeds),
    )


def _training_flops(
    config: StudyConfig, models: Counts, steps: Sequence[int], num_train: int, checkpointing: bool
) -> float:
    """FLOPs of encoding, and of the `steps` of each arm."""
    flops = models.flops
    batches = sum(number * arm.batch_size for number, arm in zip(steps, config.expand_arms(), strict=True))
    encoded = num_train * (2 if config.data.flip else 1)
    encoding = encoded * flops["encode"] + num_train * flops["text"]
    adapts_text = any(target.component == "text_encoder" for target in models.targets)
    training = TRAIN_TO_FORWARD_FLOPS * (flops["unet"] + adapts_text * flops["text"])
    training *= batches * config.train.accumulation_steps
    return encoding + training * (_CHECKPOINTING_FLOPS if checkpointing else 1)


def _diagnosis_flops(
    config: StudyConfig, flops: Mapping[str, int], parts: Sequence[Part], num_train: int, there: int
) -> float:
    """FLOPs of the sweep's pictures, and of losses at fixed noise on as many as there may be: at most
    `num_train` to train on, and those held out of the `there` that are known to be.
    """
    if not parts:
        return 0.0
    num_models, section = 1 + len(config.expand_arms()), config.data
    heldout = max(1, round(section.heldout_share * there)) if there else MAX_PICTURES
    heldout = min(heldout, section.num_heldout or MAX_PICTURES, MAX_PICTURES)
    num_pictures = heldout + min(num_train, heldout) + NUM_DRAWINGS
    probes = num_models * num_pictures * 2 * NUM_BANDS * flops["unet"]
    return probes + sum(part.num_pictures * _drawing_flops(part.section, flops) for part in parts)


def _disk_bytes(
    config: StudyConfig, passes: Packing, counts: Sequence[int], num_train: int, num_drawn: int
) -> int:
    """What the run folder and the latents kept for it take; `counts` are the parameters of each arm."""
    data, num_copies = config.data, 2 if config.train.keep_best else 1
    latents = num_train * (2 if data.flip else 1) * 2 * 4 * 4 * (data.resolution_px // 8) ** 2
    pictures = num_drawn * 2 * data.resolution_px**2
    exported = (4 if config.export.dtype == "fp32" else 2) * len(config.export.formats)
    at_once = sorted(len(group.arms) for group in passes.groups)[-passes.num_workers :]
    checkpoints = 3 * 4 * max(counts) * sum(at_once)
    return (4 * num_copies + exported) * sum(counts) + checkpoints + pictures + latents


def _num_previews(config: StudyConfig) -> int:
    """Pictures drawn while training: of the base once, of every arm after so many epochs."""
    sample = config.sample
    if not sample.preview_every_epochs:
        return 0
    times = sum(arm.epochs // sample.preview_every_epochs for arm in config.expand_arms())
    return sample.num_previews * (times + 1)


def _plan_diagnosis(config: StudyConfig, prompts: Sequence[Prompt]) -> list[Part]:
    """What the diagnose stage draws if no arm's best epoch is its last."""
    if not config.diagnose.enabled:
        return []
    wanted = [epoch for epoch in config.diagnose.epochs if epoch == "last" or config.train.keep_best]
    arms = config.expand_arms()
    epochs = {arm.name: tuple(wanted) or ("last",) for arm in arms}
    edits = plan_edits(arms, config.diagnose)
    return plan_sweep(epochs, prompts, config.sample, config.diagnose, edits)


def _drawing_flops(section: SampleSection, flops: Mapping[str, float]) -> float:
    """FLOPs of one picture."""
    passes = section.steps * (1 if section.guidance == 1 else 2)
    return flops["unet"] * passes + flops["decode"] + flops["text"]
