"""What one training step computes: forward, backward, clipping and the optimizer, for all arms of a group.

Everything lies in buffers at fixed places and nothing is read back by the host, so that on a GPU the kernels
of a step are recorded once in CUDA graphs and replayed: a host that launches thousands of kernels a step may
be slower than the GPU.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch.utils.checkpoint import checkpoint

from lorascope.adapters.bank import AdapterBank
from lorascope.base.loading import Base
from lorascope.config import TrainSection
from lorascope.console import log
from lorascope.errors import first_line
from lorascope.training.feed import Batch
from lorascope.training.objective import add_noise, prediction_target, training_losses
from lorascope.training.optimizers import build_optimizer

_FP16_LOSS_SCALE = 4096.0
"""What losses are multiplied by before the backward pass of an fp16 base, and gradients divided by after it:
those of activations would vanish among fp16's smallest numbers (6e-5 normal, 6e-8 at all).
"""

_WARM_UPS = 3  # passes before a recording, in which libraries choose kernels and allocate


class Step:
    """One optimizer step: `begin`, `add_batch` once or more, `finish`."""

    def __init__(self, base: Base, bank: AdapterBank, section: TrainSection) -> None:
        device, num_arms = base.device, len(bank.arms)
        self.base, self.bank, self.section = base, bank, section
        self.optimizer = build_optimizer(bank, section)
        self.losses = torch.zeros(num_arms, device=device)  # of the step so far
        self.norms = torch.zeros(num_arms, device=device)  # of the gradients, before clipping
        self.lrs = torch.zeros(num_arms, device=device)
        self.active = torch.ones(
            num_arms, dtype=torch.bool, device=device
        )  # arms that have met nothing that is not finite
        self.unet = torch.compile(base.unet, dynamic=False) if section.compile else base.unet
        self.loss_scale = _FP16_LOSS_SCALE if base.unet.dtype == torch.float16 else 1.0
        if section.gradient_checkpointing:
            # The U-Net draws nothing at random, and reading the generator's state cannot be recorded.
            base.unet.enable_gradient_checkpointing(
                functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            )
        else:  # a group before this one may have needed it
            base.unet.disable_gradient_checkpointing()
        self._add_batch: Callable[..., None] = self._backward
        self._finish: Callable[..., None] = self._update
        self.mode = self._choose_mode()

    def _choose_mode(self) -> str:
        """Record the step where that can be; returns how it runs, for the log."""
        compiled = "compiled, " if self.section.compile else ""
        if self.base.device.type != "cuda":
            return f"{compiled}eager: CUDA graphs need a GPU"
        if not self.section.cuda_graph:
            return f"{compiled}eager: train.cuda_graph is off"
        self._add_batch = Recorded(self._backward, [self.bank.gradients, self.losses])
        if not self.optimizer.is_recordable:
            return f"{compiled}a CUDA graph for forward and backward; {self.section.optimizer} runs eagerly"
        state = [
            self.bank.parameters,
            self.bank.gradients,
            self.norms,
            self.active,
            *self.optimizer.buffers(),
        ]
        self._finish = Recorded(self._update, state)
        return f"{compiled}a CUDA graph for forward and backward, one for clipping and AdamW"

    def begin(self, lrs: torch.Tensor) -> None:
        """Start a step at the learning rates `lrs` float32 [N]."""
        self.bank.gradients.zero_()
        self.losses.zero_()
        self.lrs.copy_(lrs, non_blocking=True)

    def add_batch(self, batch: Batch) -> None:
        """Add the gradients of a batch's loss to the bank's, and the loss to `losses`."""
        self._add_batch(*batch)

    def finish(self) -> None:
        """Clip, and move the arms whose loss and gradients are finite; from the first that is not, an arm
        stands still.
        """
        self._finish()

    def _backward(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
    ) -> None:
        base, section = self.base, self.section
        if self.bank.adapts_text:
            text = base.text_states(text)
        noisy = add_noise(latents, noise, timesteps, base.alphas_cumprod)
        target = prediction_target(latents, noise, timesteps, base.alphas_cumprod, base.prediction_type)
        prediction = self.unet(noisy.to(base.unet.dtype), timesteps, text.to(base.unet.dtype)).sample
        losses = training_losses(
            prediction, target, timesteps, base.alphas_cumprod, base.prediction_type, section
        )
        losses = losses.view(len(self.losses), -1).mean(dim=1) / section.accumulation_steps  # (N)
        (losses.sum() * self.loss_scale).backward()
        self.losses += losses.detach()

    def _update(self) -> None:
        factors = torch.full_like(self.norms, 1 / self.loss_scale)
        self.norms.copy_(self.bank.gradient_norms() * factors)
        self.active.logical_and_(self.losses.isfinite() & self.norms.isfinite())
        if self.section.max_grad_norm:
            factors = factors * (self.section.max_grad_norm / (self.norms + 1e-6)).clamp(max=1.0)
        if self.section.max_grad_norm or self.loss_scale != 1:
            self.bank.gradients.mul_(factors[:, None])
        self.optimizer.step(self.lrs, self.active)


class Recorded:
    """A function of tensors that works in place on buffers, recorded for each shape of its arguments and
    replayed.

    `state` lists the buffers that it changes: they are put back after the passes that a recording needs.
    Where recording fails, the function runs as it is and a warning says why.
    """

    def __init__(self, function: Callable[..., None], state: Sequence[torch.Tensor]) -> None:
        self.function, self.state = function, state
        self.recordings: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = {}
        self.failed = False

    def __call__(self, *arguments: torch.Tensor) -> None:
        key = tuple(argument.shape for argument in arguments)
        if key not in self.recordings and not self.failed:
            try:
                self.recordings[key] = self._record(arguments)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.failed = True
                log.warning("train    no CUDA graph, slower steps: %s", first_line(error))
        if key not in self.recordings:
            self.function(*arguments)
            return
        graph, buffers = self.recordings[key]
        for buffer, argument in zip(buffers, arguments, strict=True):
            buffer.copy_(argument, non_blocking=True)
        graph.replay()

    def _record(self, arguments: Sequence[torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
        buffers, saved = (
            [argument.clone() for argument in arguments],
            [buffer.clone() for buffer in self.state],
        )
        pool = next(iter(self.recordings.values()))[0].pool() if self.recordings else None
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self.function(*buffers)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(
                graph, pool=pool, capture_error_mode="thread_local"
            ):  # a thread reads batches meanwhile
                self.function(*buffers)
        finally:
            with torch.no_grad():
                for buffer, value in zip(self.state, saved, strict=True):
                    buffer.copy_(value)
        return graph, buffers
