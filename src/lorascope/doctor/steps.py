"""A training step by its fast paths against the plain one; a training that goes on from its checkpoint."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.targets import resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.data.encoding import Encoded
from lorascope.doctor.findings import (
    CHANNELS_LAST,
    RECORDED_STEP,
    RESUME,
    STACKED_ARMS,
    Finding,
)
from lorascope.doctor.judging import excess, judge, relative_error, rounding
from lorascope.sections import REFERENCE_TARGETS, TrainSection
from lorascope.seeding import seeded
from lorascope.training.feed import Batch
from lorascope.training.step import Step
from lorascope.training.trainer import Trainer

StepKind = Callable[[Base, AdapterBank, TrainSection], Step]
LatentShape = tuple[int, int, int]  # (c, h, w)
ARMS = (
    Arm(name="r4", rank=4, alpha=4, lr=0.05, seed=0),
    Arm(name="r8", rank=8, alpha=16, lr=0.1, seed=1),
)
# With an epsilon about as large as gradients are, AdamW moves a weight in proportion to its gradient; with
# the usual 1e-8 a gradient that is nothing but rounding moves it as far as any other, and nothing could be
# compared.
_SECTION = TrainSection(batch_size=1, epochs=1, eps=1e-2, weight_decay=0.0)
_EAGER = _SECTION.model_copy(update={"cuda_graph": False})
_UP_STD = 0.02  # of made-up B matrices: zeros would hide what A matrices do


def check_stacked_arms(base: Base, shape: LatentShape) -> Finding:
    """Loss and gradients of two arms in one pass against those of each alone."""
    together = _gradients(base, ARMS, shape)
    alone = [_gradients(base, [arm], shape)[0] for arm in ARMS]
    told = f"gradients of {len(ARMS)} arms in one pass against each alone"
    return judge(STACKED_ARMS, _largest_error(together, alone), rounding(base.unet), told)


def check_channels_last(base: Base, shape: LatentShape) -> Finding:
    """Loss and gradients with the U-Net's convolutions in `channels_last` against contiguous ones."""
    contiguous = _gradients(base, ARMS, shape)
    base.unet.to(memory_format=torch.channels_last)
    try:
        last = _gradients(base, ARMS, shape)
    finally:
        base.unet.to(memory_format=torch.contiguous_format)
    told = "gradients against those of the contiguous format"
    return judge(CHANNELS_LAST, _largest_error(last, contiguous), rounding(base.unet), told)


def _gradients(base: Base, arms: Sequence[Arm], shape: LatentShape) -> list[torch.Tensor]:
    """Loss and gradients of each arm after one pass, run eagerly: float32 [1 + p] on the CPU."""
    with _stacked(base, arms) as bank:
        step = Step(base, bank, _EAGER)
        step.begin(torch.zeros(len(arms)))
        step.add_batch(_batch(base, len(arms), shape, 0))
        parts = [bank.unpadded(bank.gradients, index).cpu() for index in range(len(arms))]
        return [torch.cat([loss[None], part]) for loss, part in zip(step.losses.cpu(), parts, strict=True)]


def _largest_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max(map(relative_error, found, expected))


@contextmanager
def _stacked(base: Base, arms: Sequence[Arm]) -> Iterator[AdapterBank]:
    """A bank of arms on the base, attached meanwhile, whose B matrices are not zero."""
    bank = AdapterBank(base.components, resolve_targets(base.unet, REFERENCE_TARGETS), arms)
    with torch.no_grad():
        for target in bank.targets:
            for index, arm in enumerate(arms):
                generator = seeded("doctor up", arm.name, target.name)
                up = torch.randn(target.out_features, arm.rank, generator=generator) * _UP_STD
                bank.layers[target.name].up[index, :, : arm.rank].copy_(up)
    bank.attach()
    try:
        yield bank
    finally:
        bank.detach()


def _batch(base: Base, num_arms: int, shape: LatentShape, key: int) -> Batch:
    """A made-up picture, the same for each arm. Text states are about standard normal, as behind a norm."""
    generator = seeded("doctor batch", key)
    latents, noise = torch.randn(2, 1, *shape, generator=generator)
    tokens, width = base.tokenizer.model_max_length, base.text_encoder.config.hidden_size
    timesteps = torch.randint(len(base.alphas_cumprod), (1,), generator=generator)
    rows = (latents, noise, timesteps, torch.randn(1, tokens, width, generator=generator))
    return Batch(*(torch.cat([row] * num_arms).to(base.device) for row in rows))


class _Taken(NamedTuple):
    """What a step left, on the CPU."""

    losses: torch.Tensor  # float32 [N]
    gradients: torch.Tensor  # float32 [N, P]
    change: torch.Tensor  # float32 [N, P]: of the parameters since before the first step
    active: torch.Tensor  # bool [N]


class _Walk(NamedTuple):
    """Steps taken in turn, by what each is for."""

    taken: dict[str, _Taken]
    mode: str  # of the steps, in words
    moved: list[str]  # tensors that did not stay where they lay when the steps were recorded


def check_recorded_step(base: Base, shape: LatentShape, kind: StepKind = Step) -> Finding:
    """Steps that `kind` records against eager ones: losses, gradients and parameters of three, and again with
    other learning rates, on another shape, after an epoch's end, and with an arm that fails.

    No tensor that a recording reads may have moved before it is replayed.
    """
    with _stacked(base, ARMS) as bank:
        mode = kind(base, bank, _SECTION).mode
    if mode.startswith("eager"):
        return Finding(RECORDED_STEP, "not checked", f"not on this device: {mode}")
    eager, recorded = _walk(base, shape, Step, _EAGER), _walk(base, shape, kind, _SECTION)
    if recorded.mode.startswith("eager"):
        return Finding(RECORDED_STEP, "slower", recorded.mode)
    if recorded.moved:
        told = f"{len(recorded.moved)} tensors moved after the recording, the first is {recorded.moved[0]}"
        return Finding(RECORDED_STEP, "wrong", told)
    findings = []
    for name, expected in eager.taken.items():
        found = recorded.taken[name]
        told = f"losses, gradients and parameters against eager steps: {name}"
        if not torch.equal(found.active, expected.active):
            told = f"{name}: arms that go on are {found.active.tolist()}, eagerly {expected.active.tolist()}"
            findings.append(Finding(RECORDED_STEP, "wrong", told))
            continue
        going = expected.active  # what an arm that fails leaves is not finite, but for its parameters
        errors = (
            relative_error(found.losses[going], expected.losses[going]),
            relative_error(found.gradients[going], expected.gradients[going]),
            relative_error(found.change, expected.change),
        )
        findings.append(judge(RECORDED_STEP, max(errors), rounding(base.unet), told))
    return next((item for item in findings if item.status == "wrong"), max(findings, key=excess))


def _walk(base: Base, shape: LatentShape, kind: StepKind, section: TrainSection) -> _Walk:
    """Take the steps of the check in turn."""
    channels, height, width = shape
    rates = torch.tensor([arm.lr for arm in ARMS])
    taken: dict[str, _Taken] = {}
    moved: list[str] = []
    with _stacked(base, ARMS) as bank:
        start, step = bank.parameters.clone(), kind(base, bank, section)
        addresses: dict[str, int] = {}

        def take(name: str, batch: Batch, lrs: torch.Tensor = rates) -> None:
            places = _addresses(step)
            moved.extend(key for key, place in places.items() if addresses.get(key, place) != place)
            step.begin(lrs)
            step.add_batch(batch)
            step.finish()
            addresses.update(addresses or places)
            results = (step.losses, bank.gradients, bank.parameters - start, step.active)
            taken[name] = _Taken(*(result.cpu().clone() for result in results))

        try:
            for number in range(3):
                take(f"step {number + 1}", _batch(base, len(ARMS), shape, number))
            take("other learning rates", _batch(base, len(ARMS), shape, 3), rates / 3)
            take("another shape", _batch(base, len(ARMS), (channels, height // 2, width), 4))
            bank.select([Slice(0)])  # as probes do
            bank.select_all()
            step.load_state(0, step.state(0))  # as a checkpoint does
            take("after an epoch's end", _batch(base, len(ARMS), shape, 5))
            batch = _batch(base, len(ARMS), shape, 6)
            batch.latents[0].fill_(math.nan)  # the first arm's picture
            take("an arm that fails", batch)
            take("after it", _batch(base, len(ARMS), shape, 7))
            mode = step.mode
        finally:
            step.close()
    return _Walk(taken, mode, moved)


def _addresses(step: Step) -> dict[str, int]:
    """Where what a recording reads and writes lies, by name."""
    bank = step.bank
    tensors = {f"unet.{name}": weight for name, weight in step.base.unet.named_parameters()}
    tensors |= {f"unet.{name}": buffer for name, buffer in step.base.unet.named_buffers()}
    for name, layer in bank.layers.items():
        tensors |= {f"{name}.{part}": getattr(layer, part) for part in ("factors", "scales", "down", "up")}
    tensors |= {"alphas_cumprod": step.base.alphas_cumprod, "parameters": bank.parameters}
    tensors |= {"gradients": bank.gradients, "losses": step.losses, "norms": step.norms, "lrs": step.lrs}
    state = [*step.optimizer.buffers(), *(step.loss_scale.buffers() if step.loss_scale else [])]
    tensors |= {"active": step.active, **{f"state {index}": buffer for index, buffer in enumerate(state)}}
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def check_resume(base: Base, shape: LatentShape) -> Finding:
    """A training of four steps against one that is left after two and goes on from its checkpoint."""
    pictures = _pictures(base, shape, 4)
    with TemporaryDirectory(prefix="lorascope-doctor-") as folder:
        path = Path(folder) / "checkpoint.safetensors"
        start, whole = _trained(base, pictures, None, None)
        _trained(base, pictures, None, path)
        _, resumed = _trained(base, pictures, path, None)
    if torch.equal(whole, resumed):
        return Finding(RESUME, "ok", "the same bits as without an interruption", 0.0, 0.0)
    if base.device.type == "cpu":
        told = "not the same bits as without an interruption"
        return judge(RESUME, relative_error(resumed - start, whole - start), 0.0, told)
    told = "not the same bits: the backward pass of attention may add in another order each time"
    return judge(RESUME, relative_error(resumed - start, whole - start), rounding(base.unet), told)


def _pictures(base: Base, shape: LatentShape, count: int) -> Encoded:
    """Made-up pictures with a caption each."""
    generator = seeded("doctor pictures")
    mean, std = torch.randn(count, *shape, generator=generator), torch.full((count, *shape), 0.1)
    tokens, width = base.tokenizer.model_max_length, base.text_encoder.config.hidden_size
    return Encoded(
        latents=tuple(torch.stack([mean, std], dim=1).unsqueeze(1)),
        captions=("",) * count,
        digests=tuple(str(index) for index in range(count)),
        repeats=(1,) * count,
        caption_index=torch.arange(count) + 1,
        text_states=torch.randn(count + 1, tokens, width, generator=generator).to(base.device),
    )


def _trained(
    base: Base, pictures: Encoded, resumed: Path | None, left: Path | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Parameters before and after a training, float32 [N, P] on the CPU; one that goes on from the checkpoint
    `resumed`, if any, and is given up half way with a checkpoint `left`, if any.
    """
    with _stacked(base, ARMS) as bank:
        start, trainer = bank.parameters.cpu().clone(), Trainer(base, bank, pictures, _SECTION)
        half = trainer.num_steps // 2
        try:
            if resumed is not None:
                trainer.load_checkpoint(resumed, "doctor")
            for record in trainer.run(pause=lambda step: step == half):
                if left is not None and record.step == half:
                    trainer.save_checkpoint(left, "doctor", {})
                    break
        finally:
            trainer.compute.close()
        return start, bank.parameters.cpu().clone()
