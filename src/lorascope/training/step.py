"""What one training step computes: forward, backward, clipping and the optimizer, for all arms of a group.

Everything lies in buffers at fixed places and nothing is read back by the host, so that on a GPU the kernels
of a step are recorded once in CUDA graphs and replayed: a host that launches thousands of kernels a step may
be slower than the GPU.
"""

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.utils.checkpoint import checkpoint

from lorascope.adapters.bank import AdapterBank
from lorascope.base.loading import Base
from lorascope.console import log
from lorascope.errors import RunError, first_line
from lorascope.machine.memory import is_out_of_memory
from lorascope.machine.transfer import send
from lorascope.sections import TrainSection
from lorascope.training.feed import Batch
from lorascope.training.objective import add_noise, prediction_target, training_losses
from lorascope.training.optimizers import build_optimizer

_WARM_UPS = 3  # passes before a recording, in which libraries choose kernels and allocate


class LossScale:
    """What each arm's loss is multiplied by before the backward pass of an fp16 base, and its gradient
    divided by after it.

    Gradients of activations would vanish among fp16's smallest numbers (6e-5 normal, 6e-8 at all). Where an
    arm's gradient is not finite, that arm skips the step and its scale is halved; after `_PATIENCE` steps
    without that it is doubled (Micikevicius et al. 2018). All scales are powers of two, so they cost no bits.
    """

    _FIRST, _LEAST, _MOST = 2.0**12, 1.0, 2.0**16
    _PATIENCE = 2000

    def __init__(self, num_arms: int, device: torch.device) -> None:
        self.factors = torch.full((num_arms,), self._FIRST, device=device)
        self.calm_steps = torch.zeros(num_arms, device=device)  # since the factor last changed
        self.skipped_steps = torch.zeros(num_arms, device=device)

    def update(self, is_finite: torch.Tensor, can_skip: torch.Tensor) -> torch.Tensor:
        """Move the scales by whether each arm's gradient `is_finite` bool [N]; returns who skips this step,
        bool [N].

        Those that cannot skip, `can_skip` bool [N], and those at the least scale have failed for another
        reason.
        """
        skips = ~is_finite & can_skip & (self.factors > self._LEAST)
        grows = is_finite & (self.calm_steps + 1 >= self._PATIENCE) & (self.factors < self._MOST)
        self.calm_steps.copy_(torch.where(skips | grows, 0.0, self.calm_steps + 1))
        self.factors.mul_(torch.where(skips, 0.5, torch.where(grows, 2.0, 1.0)))
        self.skipped_steps.add_(skips)
        return skips

    def buffers(self) -> list[torch.Tensor]:
        """The tensors that `update` changes."""
        return [self.factors, self.calm_steps, self.skipped_steps]

    def state(self, index: int) -> torch.Tensor:
        """What `load_state` needs of arm `index`: float32 [3]."""
        return torch.stack([buffer[index] for buffer in self.buffers()])

    def load_state(self, index: int, state: torch.Tensor) -> None:
        """Continue with arm `index` from what `state` gave."""
        for buffer, value in zip(self.buffers(), state, strict=True):
            buffer[index] = value


class Step:
    """One optimizer step: `begin`, `add_batch` once or more, `finish`; `close` frees what was recorded."""

    def __init__(self, base: Base, bank: AdapterBank, section: TrainSection) -> None:
        device, num_arms = base.device, len(bank.arms)
        self.base, self.bank, self.section = base, bank, section
        self.optimizer = build_optimizer(bank, section)
        self.losses = torch.zeros(num_arms, device=device)  # of the step so far
        self.norms = torch.zeros(num_arms, device=device)  # of the gradients, before clipping
        self.lrs = torch.zeros(num_arms, device=device)
        # arms that have met nothing that is not finite
        self.active = torch.ones(num_arms, dtype=torch.bool, device=device)
        self.unet = torch.compile(base.unet, dynamic=False) if section.compile else base.unet
        self.loss_scale = LossScale(num_arms, device) if base.unet.dtype == torch.float16 else None
        if section.gradient_checkpointing:
            # The U-Net draws nothing at random, and reading the generator's state cannot be recorded.
            base.unet.enable_gradient_checkpointing(
                functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            )
        else:  # a group before this one may have needed it
            base.unet.disable_gradient_checkpointing()
        self._recorded_backward: Recorded | None = None
        self._recorded_update: Recorded | None = None
        if base.device.type == "cuda" and section.cuda_graph:
            self._record()

    def _record(self) -> None:
        """Let what can be recorded be recorded when it is first called."""
        self._recorded_backward = Recorded(self._backward, [self.bank.gradients, self.losses])
        if self.optimizer.is_recordable:
            state = [self.bank.parameters, self.bank.gradients, self.norms, self.active]
            scales = self.loss_scale.buffers() if self.loss_scale else []
            self._recorded_update = Recorded(self._update, [*state, *scales, *self.optimizer.buffers()])

    @property
    def mode(self) -> str:
        """How steps run, in words."""
        compiled = "compiled, " if self.section.compile else ""
        if self.base.device.type != "cuda":
            return f"{compiled}eager: CUDA graphs need a GPU"
        if not self.section.cuda_graph:
            return f"{compiled}eager: train.cuda_graph is off"
        if any(part and part.failed for part in (self._recorded_backward, self._recorded_update)):
            return f"{compiled}eager: recording a CUDA graph failed"
        if self._recorded_update is None:
            return f"{compiled}a CUDA graph for forward and backward; {self.section.optimizer} runs eagerly"
        return f"{compiled}a CUDA graph for forward and backward, one for clipping and AdamW"

    def begin(self, lrs: torch.Tensor) -> None:
        """Start a step at the learning rates `lrs` float32 [N]."""
        self.bank.gradients.zero_()
        self.losses.zero_()
        self.lrs.copy_(send(lrs, self.lrs.device))

    def add_batch(self, batch: Batch) -> None:
        """Add the gradients of a batch's loss to the bank's, and the loss to `losses`."""
        (self._recorded_backward or self._backward)(*batch)

    def finish(self) -> None:
        """Clip, and move the arms whose loss and gradients are finite; from the first that is not, an arm
        stands still.

        With an fp16 base an arm whose gradient alone is not finite skips the step, see `LossScale`.
        """
        (self._recorded_update or self._update)()

    def prepare(self, batch: Batch) -> None:
        """Record the passes for a batch's shapes, where they are recorded, without taking a step."""
        if self._recorded_backward is not None:
            self._recorded_backward.prepare(*batch)

    def close(self) -> None:
        """Give the memory of recordings back. No step can be taken afterwards with their speed."""
        for recorded in (self._recorded_backward, self._recorded_update):
            if recorded is not None:
                recorded.close()
        self._recorded_backward = self._recorded_update = None  # they hold this step, and it them

    def state(self, index: int) -> dict[str, torch.Tensor]:
        """All that a step changes of arm `index` besides its adapter, by name."""
        state = {"active": self.active[index]}
        if self.loss_scale is not None:
            state["loss_scale"] = self.loss_scale.state(index)
        optimizer = self.optimizer.state(index)
        return state | {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}

    def load_state(self, index: int, state: Mapping[str, torch.Tensor]) -> None:
        """Continue arm `index` from what `state` gave; a checkpoint of 0.1.0 has no scale of the loss."""
        self.active[index] = state["active"]
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.load_state(index, state["loss_scale"])
        prefix = "optimizer."
        optimizer = {
            name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
        }
        self.optimizer.load_state(index, optimizer)

    def _backward(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
    ) -> None:
        base, section = self.base, self.section
        if self.bank.adapts_text:
            text = base.text_states(text)
        noisy = add_noise(latents, noise, timesteps, base.alphas_cumprod)
        target = prediction_target(latents, noise, timesteps, base.alphas_cumprod, base.prediction_type)
        self.bank.at(timesteps, training=True, noise=noise)
        prediction = self.unet(noisy.to(base.unet.dtype), timesteps, text.to(base.unet.dtype)).sample
        losses = training_losses(
            prediction, target, timesteps, base.alphas_cumprod, base.prediction_type, section
        )
        losses = losses.view(len(self.losses), -1).mean(dim=1) / section.accumulation_steps  # (N)
        scaled = losses if self.loss_scale is None else losses * self.loss_scale.factors
        scaled.sum().backward()
        self.losses += losses.detach()

    def _update(self) -> None:
        norms, factors = self.bank.gradient_norms(), None
        if self.loss_scale is not None:
            factors = 1 / self.loss_scale.factors
            norms = norms * factors
        self.norms.copy_(norms)
        loss_is_finite, norm_is_finite = self.losses.isfinite(), norms.isfinite()
        moves = self.active & loss_is_finite & norm_is_finite
        stays = moves
        if self.loss_scale is not None:
            stays = moves | self.loss_scale.update(norm_is_finite, self.active & loss_is_finite)
        self.active.copy_(stays)
        if self.section.max_grad_norm:
            clipped = (self.section.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            factors = clipped if factors is None else factors * clipped
        if factors is not None:
            self.bank.gradients.mul_(factors[:, None])
        self.optimizer.step(self.lrs, moves)
        self.bank.limit_norms(moves)


_Recording = tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]  # and the buffers it reads its arguments from


class Recorded:
    """A function of tensors that works in place on buffers, recorded for each shape of its arguments and
    replayed.

    `state` lists the buffers that it changes: they are put back after the passes that a recording needs.
    Where recording fails, the function runs as it is and a warning says why.
    """

    def __init__(self, function: Callable[..., None], state: Sequence[torch.Tensor]) -> None:
        self.function, self.state = function, state
        self.recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        self.failed = False

    def __call__(self, *arguments: torch.Tensor) -> None:
        recording = self.prepare(*arguments)
        if recording is None:
            self.function(*arguments)
            return
        graph, buffers = recording
        for buffer, argument in zip(buffers, arguments, strict=True):
            buffer.copy_(argument, non_blocking=True)
        graph.replay()

    def prepare(self, *arguments: torch.Tensor) -> _Recording | None:
        """The recording for arguments of these shapes, made now if there is none; None where recording
        fails.

        Raises `RunError` where a failure leaves the GPU of no use to this process.
        """
        key = tuple(argument.shape for argument in arguments)
        if key not in self.recordings and not self.failed:
            try:
                self.recordings[key] = self._record(arguments)
            except RuntimeError as error:
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise RunError(
                        f"a CUDA graph could be neither recorded nor given up ({first_line(error)}): set "
                        "train.cuda_graph = false and run the same command again"
                    ) from error
                if is_out_of_memory(error):
                    raise
                self.close()
                self.failed = True
                log.warning("train    no CUDA graph, slower steps: %s", first_line(error))
        return self.recordings.get(key)

    def close(self) -> None:
        """Free the recordings and the memory that they share."""
        for graph, _ in self.recordings.values():
            graph.reset()
        self.recordings.clear()

    def _record(self, arguments: Sequence[torch.Tensor]) -> _Recording:
        buffers, saved = (
            [argument.clone() for argument in arguments],
            [buffer.clone() for buffer in self.state],
        )
        pool = next(iter(self.recordings.values()))[0].pool() if self.recordings else None
        graph = torch.cuda.CUDAGraph()
        # Autograd adds to a leaf's gradient on the stream that first used it: one for warm-ups and recording.
        stream, caller = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self.function(*buffers)
            with (
                _no_collection(),
                # a thread reads batches meanwhile
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                self.function(*buffers)
        finally:
            caller.wait_stream(stream)
            with torch.no_grad():
                for buffer, value in zip(self.state, saved, strict=True):
                    buffer.copy_(value)
        return graph, buffers


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within, cycles are not collected: freeing an older graph would break one that is being recorded."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
