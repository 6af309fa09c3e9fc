"""Calls to be timed for tuning, an attention or a pass over a U-Net cut until it is short, and their race."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.targets import resolve_targets
from lorascope.arms import Arm
from lorascope.base.attention import (
    Kernel,
    Shape,
    attend,
    attention_layers,
)
from lorascope.base.ldm import build_component
from lorascope.base.loading import DTYPES
from lorascope.console import log
from lorascope.errors import first_line
from lorascope.sections import REFERENCE_TARGETS

_REPLAYS = 10  # of a CUDA graph in one timed call: one is too short for the clock
# Work of a timed pass, forward: enough to be typical, little enough that the whole takes seconds.
_PASS_FLOPS = {"cpu": 12e9, "cuda": 2e12}
T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """What a run asks of the U-Net."""

    latent_shape: tuple[int, int, int]  # (c, h, w)
    text_tokens: int
    train_batch: int  # samples of a training pass: pictures times the arms stacked
    sample_batch: int  # samples of a pass without gradients


def build_workload(
    configs: Mapping[str, Mapping[str, Any]], resolution_px: int, train_batch: int, sample_batch: int
) -> Workload:
    """What square pictures of `resolution_px` ask of a base with these configurations of `unet`, `vae` and
    `text_encoder`.
    """
    vae, text = configs["vae"], configs["text_encoder"]
    side = math.ceil(resolution_px / 2 ** (len(vae.get("block_out_channels", "1")) - 1))
    shape = (int(vae.get("latent_channels", 4)), side, side)
    return Workload(shape, int(text.get("max_position_embeddings", 77)), train_batch, sample_batch)


def survey(config: Mapping[str, Any], workload: Workload) -> tuple[float, dict[Shape, int]]:
    """FLOPs of a forward pass over the training batch, and how many layers have an attention of which shape,
    without gradients.
    """
    unet: Any = _on_meta(config)
    shapes: dict[Shape, int] = {}

    def note(layer: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        context = kwargs.get("encoder_hidden_states")
        queries, heads = args[0].shape[1], layer.heads
        shape = Shape(
            queries,
            queries if context is None else context.shape[1],
            heads,
            layer.to_q.out_features // heads,
            False,
        )
        shapes[shape] = shapes.get(shape, 0) + 1

    for layer in attention_layers(unet):
        layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        sample = torch.empty(workload.train_batch, *workload.latent_shape, device="meta")
        text = torch.empty(workload.train_batch, workload.text_tokens, _text_width(unet), device="meta")
        unet(sample, torch.zeros((), device="meta"), text)
    return float(counter.get_total_flops()), shapes


def attention_run(
    kernel: Kernel, shape: Shape, samples: int, heads: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """One attention as the U-Net calls it, from what the projections give to what they take, and its backward
    pass.
    """
    generator = torch.Generator(device).manual_seed(0)
    width = heads * shape.head_dim
    leaves = [
        torch.randn(samples, tokens, width, generator=generator, device=device, dtype=dtype).requires_grad_(
            shape.gradients
        )
        for tokens in (shape.queries, shape.keys, shape.keys)
    ]

    def run() -> None:
        with torch.set_grad_enabled(shape.gradients):
            query, key, value = (leaf.unflatten(-1, (heads, -1)).transpose(1, 2) for leaf in leaves)
            out = attend(kernel, query, key, value).transpose(1, 2).flatten(2)
            if shape.gradients:
                torch.autograd.grad(out, leaves, out.detach())

    return run


def cut_to_budget(
    config: Mapping[str, Any], workload: Workload, flops: float, device: torch.device
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A configuration and a shape [batch, c, h, w] whose pass is short enough to be timed.

    First the batch is cut, then the coarser levels, which hold the most weights and the least work, then the
    latent's sides.
    """
    budget = _PASS_FLOPS[device.type]
    batch = max(1, min(workload.train_batch, int(workload.train_batch * budget / flops)))
    flops *= batch / workload.train_batch
    cut, (channels, height, width) = dict(config), workload.latent_shape
    while flops > budget:
        if (levels := len(cut["block_out_channels"])) > 1:
            cut = _without_coarsest(cut, levels)
        elif min(height, width) >= 32:
            height, width = height // 2, width // 2
        else:
            break
        flops, _ = survey(cut, Workload((channels, height, width), workload.text_tokens, batch, batch))
    return cut, (batch, channels, height, width)


def _without_coarsest(config: Mapping[str, Any], levels: int) -> dict[str, Any]:
    """The configuration of a U-Net less its last level; lists with a value a level lose the last, those of
    the way up the first.
    """
    upwards = ("up_block_types", "reverse_transformer_layers_per_block")
    return {
        key: (value[1:] if key in upwards else value[:-1])
        if isinstance(value, list | tuple) and len(value) == levels
        else value
        for key, value in config.items()
    }


def pass_run(
    config: Mapping[str, Any],
    shape: tuple[int, ...],
    text_tokens: int,
    precision: str,
    prepare: Callable[[UNet2DConditionModel], None],
    device: torch.device,
) -> Callable[[], None]:
    """A training pass of a U-Net with random weights and adapters of rank 16, and a drawing pass of the same
    samples of `shape` [batch, c, h, w]; `prepare` gives it memory format and kernels.
    """
    generator = torch.Generator(device).manual_seed(0)
    unet: Any = _on_meta(config).to(DTYPES[precision]).to_empty(device=device).requires_grad_(False)
    for parameter in unet.parameters():
        bound = 1 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 1.0
        parameter.uniform_(-bound, bound, generator=generator)
    prepare(unet)
    arm = Arm(name="timed", rank=16, alpha=16, lr=1e-4, seed=0)
    AdapterBank({"unet": unet}, resolve_targets(unet, REFERENCE_TARGETS), [arm]).attach()
    sample = torch.randn(shape, generator=generator, device=device).to(unet.dtype)
    text = torch.randn(shape[0], text_tokens, _text_width(unet), generator=generator, device=device).to(
        unet.dtype
    )
    timesteps = torch.zeros(shape[0], dtype=torch.int64, device=device)

    def run() -> None:
        unet(sample, timesteps, text).sample.float().sum().backward()
        with torch.no_grad():
            unet(sample, timesteps, text)

    return run


def _on_meta(config: Mapping[str, Any]) -> torch.nn.Module:
    """A U-Net of shapes alone."""
    with torch.device("meta"):
        return build_component("unet", config).eval()


def _text_width(unet: Any) -> int:
    width = unet.config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


def race(runs: Mapping[T, Callable[[], None]], device: torch.device) -> dict[T, float]:
    """The least seconds that each of these takes; what raises `RuntimeError`, as an absent kernel or full
    memory does, is left out.

    They are called in turns, so that a change in the machine's speed meets all, and the least is what other
    processes disturbed least. On a GPU a CUDA graph of each is replayed: launching takes as long as small
    kernels do.
    """
    ready = {}
    for name, run in runs.items():
        try:
            ready[name] = _warmed(run, device)
        except RuntimeError as error:
            log.debug("tuning   %s cannot be used: %s", name, first_line(error))
    times, calls = dict.fromkeys(ready, math.inf), _REPLAYS if device.type == "cuda" else 1
    started, rounds = time.perf_counter(), 0
    while times and (rounds < 2 or (rounds < 20 and time.perf_counter() - started < 0.03)):
        for name, run in ready.items():
            before = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name] = min(times[name], (time.perf_counter() - before) / calls)
        rounds += 1
    return times


def _warmed(run: Callable[[], None], device: torch.device) -> Callable[[], Any]:
    """The same, called before; on a GPU as `_REPLAYS` replays of its CUDA graph."""
    if device.type == "cpu":
        run()
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # as capturing demands
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        for _ in range(_REPLAYS):
            graph.replay()

    return replay
