"""Each fast path against the plain one, on the device at hand.

A check takes what it looks at as arguments, so that a test can plant a fault in it, and returns a `Finding`.
Tolerances follow from the dtypes: what is right stays several times below them, what is wrong is far above.
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import nn

from lorascope.adapters.bank import AdapterBank, Slice, resolve_targets
from lorascope.base.attention import KERNELS, Kernel, Shape, attend, padded_head_dims
from lorascope.base.autoencoder import Autoencoder
from lorascope.base.loading import Base
from lorascope.console import size
from lorascope.data.encoding import Encoded
from lorascope.doctor.findings import (
    ATTENTION,
    CHANNELS_LAST,
    HALF_VAE,
    MEMORY,
    RECORDED_STEP,
    RESUME,
    STACKED_ARMS,
    WORKERS,
    Finding,
)
from lorascope.errors import first_line
from lorascope.machine.facts import device_facts
from lorascope.machine.memory import free_bytes, is_out_of_memory, used_bytes
from lorascope.machine.workers import worker_environments
from lorascope.schema import REFERENCE_TARGETS, Arm, TrainSection
from lorascope.seeding import seeded
from lorascope.training.feed import Batch
from lorascope.training.footprint import FREE_SHARE
from lorascope.training.step import Step
from lorascope.training.trainer import Trainer

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
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
_ATTENTION_FLOPS = {
    "cpu": 2e8,
    "mps": 2e9,
    "cuda": 4e10,
}  # of one attention, forward: as many heads as this allows
# Kernels add in another order and round elsewhere than the plain formula does in the same dtype.
# flash-attention's own tests allow twice the plain formula's largest error in outputs, and three times that
# in gradients; one epsilon is for results that the plain formula happens to round right.
_ATTENTION_FACTOR = 4.0
_ALLOCATED_ON_CPU = 2**29
_MEMORY_BLOCK = 2**28
# Of what was allocated: other programs allocate and free meanwhile, and on a CPU those are all there are.
_MEMORY_TOLERANCE = {"cpu": 0.9, "mps": 0.9, "cuda": 0.25}
_MEMORY_TRIES = 5  # one that is right will do
_MEMORY_SETTLES_S = 0.2  # what is freed is not told free at once
_WORKER_TIMEOUT_S = 120
_TELL_GPUS = """\
import torch
for index in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(index).uuid)
"""


def rounding(unet: nn.Module) -> float:
    """The relative l2 error of a pass over a U-Net, forward and backward, that rounding may explain.

    Each layer rounds its output by up to half an epsilon of its dtype, and the sums in it, of K products each
    and in float32, by up to half an epsilon of float32 a product. Roundings are independent, so over L layers
    they grow as the square roots of L and of the sum of all K; the other half is for there being two passes.
    """
    weights = [parameter for parameter in unet.parameters() if parameter.dim() > 1]
    num_products = sum(weight[0].numel() for weight in weights)
    dtype = weights[0].dtype
    has_tf32 = dtype == torch.float32 and weights[0].is_cuda and torch.backends.cudnn.allow_tf32
    eps = 2.0**-10 if has_tf32 else torch.finfo(dtype).eps
    return eps * math.sqrt(len(weights)) + torch.finfo(torch.float32).eps * math.sqrt(num_products)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The l2 norm of the difference over that of `expected`; infinite where `found` is not finite."""
    if not found.isfinite().all():
        return math.inf
    true = expected.cpu().double()
    norm = torch.linalg.vector_norm(true).clamp(min=1e-30)
    return float(torch.linalg.vector_norm(found.cpu().double() - true) / norm)


def judge(check: str, error: float, tolerance: float, told: str) -> Finding:
    """Ok within the tolerance, else wrong."""
    if not math.isfinite(error):
        return Finding(check, "wrong", f"{told}: not finite", None, tolerance)
    return Finding(check, "ok" if error <= tolerance else "wrong", told, error, tolerance)


# -- attention -----------------------------------------------------------------------------------------------


class _Attended(NamedTuple):
    """What an attention gives, each [samples, tokens, heads * head_dim]."""

    output: torch.Tensor
    gradient_of_query: torch.Tensor
    gradient_of_key: torch.Tensor
    gradient_of_value: torch.Tensor
    output_without_gradients: torch.Tensor


def check_attention(
    shapes: Iterable[Shape],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    attend: Callable[[Kernel, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = attend,
) -> list[Finding]:
    """Every kernel of attention as the U-Net calls it, padded or not, forward and backward, against the
    formula in float64: a finding for each.

    Error and tolerance are of the largest difference at the worst place, over the largest value there.
    """
    worst: dict[str, Finding] = {}
    counts, lacks = dict.fromkeys(KERNELS, 0), dict.fromkeys(KERNELS, "")
    home = torch.device("cpu") if device.type == "mps" else device  # an Apple GPU has no float64
    for shape in shapes:
        for dtype in dtypes:
            leaves, heads = _attention_inputs(shape, dtype, device)
            parts = zip(*(leaf.to(home).double().chunk(heads, dim=-1) for leaf in leaves), strict=True)
            by_head = [_attended(_plain_attention, part, 1) for part in parts]  # all at once may be too much
            expected = _Attended(*(torch.cat(results, dim=-1) for results in zip(*by_head, strict=True)))
            plain = _attended(_plain_attention, leaves, heads)
            for kernel in _variants(shape.head_dim):
                try:
                    found = _attended(lambda *qkv, kernel=kernel: attend(kernel, *qkv), leaves, heads)
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                    lacks[kernel.name] = first_line(error)
                    continue
                counts[kernel.name] += 1
                place = (
                    f"{shape.queries}x{shape.keys} heads {shape.heads}x{shape.head_dim} {_name(dtype)}, "
                    f"{kernel}"
                )
                finding = _compare_attention(kernel.name, place, found, plain, expected)
                if kernel.name not in worst or _excess(finding) > _excess(worst[kernel.name]):
                    worst[kernel.name] = finding
    findings = []
    for name in KERNELS:
        if name in worst:
            finding = replace(worst[name], told=f"worst of {counts[name]}: {worst[name].told}")
        elif device.type == "cpu":
            finding = Finding(ATTENTION + name, "not checked", "not on this device")
        else:
            finding = Finding(ATTENTION + name, "slower", f"not here, others take its place: {lacks[name]}")
        findings.append(finding)
    return findings


def _variants(head_dim: int) -> Iterator[Kernel]:
    """Every kernel, and all but the plain one also with each of the padded head dimensions."""
    for name in KERNELS:
        yield Kernel(name)
        if name != "plain":
            yield from (Kernel(name, padded) for padded in padded_head_dims(head_dim))


def _attention_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[list[torch.Tensor], int]:
    """Query, key, value and the output's gradient [samples, tokens, heads * head_dim], as many heads as can
    be computed soon, and how many those are.
    """
    flops = 4 * shape.queries * shape.keys * shape.head_dim
    heads = max(1, min(shape.heads, int(_ATTENTION_FLOPS[device.type] / flops)))
    samples = 2 if 2 * heads * flops <= _ATTENTION_FLOPS[device.type] else 1
    generator = seeded("doctor attention", *shape)
    tokens = (shape.queries, shape.keys, shape.keys, shape.queries)
    drawn = [torch.randn(samples, count, heads * shape.head_dim, generator=generator) for count in tokens]
    return [part.to(device, dtype) for part in drawn], heads


def _plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return attend(Kernel("plain"), query, key, value)


def _attended(attention: Attention, inputs: Sequence[torch.Tensor], heads: int) -> _Attended:
    """Output and gradients of an attention, from what the projections give to what they take."""
    *leaves, gradient = (part.detach() for part in inputs)

    def run() -> torch.Tensor:
        split = (leaf.unflatten(-1, (heads, -1)).transpose(1, 2) for leaf in leaves)
        return attention(*split).transpose(1, 2).flatten(2)

    with torch.no_grad():
        without = run()
    for leaf in leaves:
        leaf.requires_grad_()
    output = run()
    query, key, value = torch.autograd.grad(output, leaves, gradient)
    return _Attended(output.detach(), query, key, value, without)


def _compare_attention(
    name: str, place: str, found: _Attended, plain: _Attended, expected: _Attended
) -> Finding:
    """The worst of an attention's results."""
    findings = []
    for part, result, usual, true in zip(_Attended._fields, found, plain, expected, strict=True):
        scale = float(true.abs().max())
        usual_error, error = (float((value.double() - true).abs().max()) / scale for value in (usual, result))
        tolerance = _ATTENTION_FACTOR * usual_error + torch.finfo(result.dtype).eps
        told = f"{part.replace('_', ' ')}, {place}"
        findings.append(judge(ATTENTION + name, error, tolerance, told))
    return max(findings, key=_excess)


def _excess(finding: Finding) -> float:
    """Error over tolerance."""
    return math.inf if finding.error is None else finding.error / (finding.tolerance or 1.0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- a training step -----------------------------------------------------------------------------------------


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
    return next((item for item in findings if item.status == "wrong"), max(findings, key=_excess))


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


# -- a checkpoint --------------------------------------------------------------------------------------------


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


# -- the VAE -------------------------------------------------------------------------------------------------


def check_half_vae(base: Base, side_px: int, dtype: torch.dtype | None = None) -> Finding:
    """The VAE in the dtype in which it works here, or `dtype`, against float32: posteriors and pictures."""
    half, plain = Autoencoder(base, dtype), Autoencoder(base, torch.float32)
    if half.dtype == torch.float32:
        return Finding(HALF_VAE, "not checked", "not on this device: the VAE works in float32 here")
    errors = []
    for pixels in _made_up_pixels(side_px):
        expected, found = plain.encode(pixels), half.encode(pixels)
        decoded = [part.decode(expected[:, 0]).float() / 255 for part in (half, plain)]
        errors += [relative_error(found, expected), relative_error(*decoded)]
    told = f"posteriors and pictures in {half.precision} against float32"
    if half.num_overflows:
        counts = f"{half.num_overflows} of {half.num_batches} batches are beyond {half.precision}"
        return Finding(HALF_VAE, "overflow", f"half precision is not used: {counts}")
    return judge(HALF_VAE, max(errors), _vae_rounding(base.vae, half.dtype), told)


def _vae_rounding(vae: nn.Module, dtype: torch.dtype) -> float:
    """As `rounding`, for one pass each way against float32, whose own rounding is of no account."""
    num_layers = sum(parameter.dim() > 1 for parameter in vae.parameters())
    return torch.finfo(dtype).eps * math.sqrt(num_layers)


def _made_up_pixels(side_px: int) -> Iterator[torch.Tensor]:
    """Pictures uint8 [1, 3, H, W] that lead a VAE far and wide: noise, a ramp, black beside white."""
    yield torch.randint(
        0, 256, (1, 3, side_px, side_px), dtype=torch.uint8, generator=seeded("doctor pixels")
    )
    ramp = torch.linspace(0, 255, side_px).round().to(torch.uint8)
    yield torch.stack(
        [ramp.expand(side_px, -1), ramp.flip(0).expand(side_px, -1), ramp[:, None].expand(-1, side_px)]
    )[None]
    halves = torch.zeros(1, 3, side_px, side_px, dtype=torch.uint8)
    halves[..., side_px // 2 :] = 255
    yield halves


# -- the machine ---------------------------------------------------------------------------------------------


def check_memory(
    device: torch.device,
    free: Callable[[torch.device], int] = free_bytes,
    used: Callable[[torch.device], int] = used_bytes,
) -> Finding:
    """What `free` tells against what can be allocated: on a GPU the share that trainings plan with, on a CPU
    a small part, and whether `free` and `used` follow.
    """
    for _ in range(_MEMORY_TRIES):
        finding = _allocate(device, free, used)
        if finding.status == "ok":
            break
        time.sleep(_MEMORY_SETTLES_S)
    return finding


def _allocate(
    device: torch.device, free: Callable[[torch.device], int], used: Callable[[torch.device], int]
) -> Finding:
    """Allocate, look, and free."""
    free_before, used_before = free(device), used(device)
    total = int(device_facts(device)["memory_bytes"])
    if free_before > total:
        return Finding(MEMORY, "wrong", f"{size(free_before)} told free of {size(total)}")
    wanted = int(FREE_SHARE * free_before) if device.type == "cuda" else _ALLOCATED_ON_CPU
    sizes = [min(_MEMORY_BLOCK, wanted - start) for start in range(0, wanted, _MEMORY_BLOCK)]
    try:
        blocks = [torch.ones(count, dtype=torch.uint8, device=device) for count in sizes]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        told = f"{size(free_before)} told free, {size(wanted)} cannot be allocated"
        return Finding(MEMORY, "wrong", told)
    gained, lost = used(device) - used_before, free_before - free(device)
    del blocks
    told = (
        f"{size(free_before)} free; {size(wanted)} allocated took {size(lost)} of it and use {size(gained)}"
    )
    deviation = max(abs(lost / wanted - 1), abs(gained / wanted - 1))
    return judge(MEMORY, deviation, _MEMORY_TOLERANCE[device.type], told)


def gpus_seen(environment: Mapping[str, str]) -> list[str]:
    """The UUIDs of the GPUs that a process with this added to its environment sees."""
    command = [sys.executable, "-c", _TELL_GPUS]
    result = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=_WORKER_TIMEOUT_S,
        check=False,
    )
    return result.stdout.split()


def check_workers(num_gpus: int, seen: Callable[[Mapping[str, str]], list[str]] = gpus_seen) -> Finding:
    """Whether workers side by side see one GPU each, and each another."""
    if num_gpus < 2:
        return Finding(
            WORKERS, "not checked", f"{num_gpus or 'no'} GPU here: nothing runs side by side on several"
        )
    environments = worker_environments("cuda", num_gpus)
    with ThreadPoolExecutor(num_gpus) as pool:
        found = list(pool.map(seen, environments))
    names = [name for names in found for name in names]
    is_right = all(len(names) == 1 for names in found) and len(set(names)) == num_gpus
    told = f"{num_gpus} workers see " + ", ".join(" and ".join(names) or "none" for names in found)
    return Finding(WORKERS, "ok" if is_right else "wrong", told)
