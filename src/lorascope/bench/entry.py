"""One entry of the benchmark under way: its model, its steps, what they take. Several run side by side, a
process each.
"""

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.differences import DifferenceLayer
from lorascope.adapters.targets import resolve_section
from lorascope.arms import Arm
from lorascope.base.attention import set_kernels
from lorascope.base.configs import read_configs
from lorascope.base.loading import DTYPES, Base, load_base
from lorascope.base.random_base import build_random_base
from lorascope.base.weights import save_tensors
from lorascope.bench.entries import NUM_PICTURES, Conditions, Entry, threads_of
from lorascope.bench.peers import FullStep, KohyaStep, PeftStep, ReferenceStep, Step, Workload, gradient_norm
from lorascope.data.encoding import Encoded
from lorascope.data.pictures import decode_picture
from lorascope.data.sources import open_source
from lorascope.errors import first_line
from lorascope.machine.arithmetic import full_fp32
from lorascope.machine.memory import is_out_of_memory, peak_memory
from lorascope.machine.speed import matmul_flops, timed
from lorascope.sections import AdapterSection, BaseSection, DataSection, TrainSection
from lorascope.training.timing import build_workload
from lorascope.training.trainer import Trainer
from lorascope.training.tuning import Tuning, tune

# The pocket study's. Alpha is twice the rank: an arm that leaves alpha out is found out.
LR, SCALE, SEED = 5e-4, 2.0, 0
_KEPT_BATCHES = 32  # made before the timing, then used again: peers get theirs for nothing
_START_METHOD = "spawn"  # a fork's peak memory would leave out what it shares


class Trajectory(NamedTuple):
    """The first steps of N adapters, for the gate."""

    losses: np.ndarray  # [steps, N]
    norms: np.ndarray  # [steps, N]: gradients before clipping
    # `<layer>.down` [N, r, in], `<layer>.up` [N, out, r] and of DoRA `<layer>.magnitude` [N, out] afterwards,
    # of full fine-tuning `<layer>.weight` and `<layer>.bias` [1, ...]; fp32
    weights: dict[str, torch.Tensor]


# The work ---------------------------------------------------------------------------------------------------


def prepare_workload(conditions: Conditions, folder: Path) -> None:
    """Write what the entries read to `folder`: the pictures, their latents and text states, and a base of
    random weights.

    The pocket base gets pictures of its own data set, others random ones: neither speed nor memory depends on
    them.
    """
    device = torch.device(conditions.device)
    if conditions.base == "sd15":
        base = build_random_base("sd15", device)
        base.build_pipeline().save_pretrained(folder / "base")
    else:
        base = load_base(BaseSection(model=conditions.base), device, "fp32")
    side = conditions.resolution_px
    if conditions.base == "pocket":
        source = open_source(DataSection())
        rows = [row for _, row in zip(range(NUM_PICTURES), source.rows(), strict=False)]
        captions = [str(row.caption) for row in rows]
        pictures = np.stack([decode_picture(source.read(row.id), side, side) for row in rows])
    else:
        captions = [f"picture {number} of a benchmark" for number in range(NUM_PICTURES)]
        pictures = np.random.default_rng(SEED).integers(0, 256, (NUM_PICTURES, side, side, 3), dtype=np.uint8)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    posteriors = [
        torch.stack(base.encode_pixels(part.float() / 127.5 - 1), dim=1).cpu() for part in pixels.split(4)
    ]
    tensors = {
        "pixels": pixels,
        "tokens": base.tokenize(captions).cpu(),
        "latents": torch.cat(posteriors),
        "text": base.encode_text(["", *captions]).cpu(),
    }
    save_tensors(folder / "workload.safetensors", tensors, {})


def load_workload(folder: Path, device: torch.device) -> Workload:
    """What `prepare_workload` wrote; latents and text states on the device."""
    tensors = safetensors.torch.load_file(folder / "workload.safetensors")
    count = len(tensors["pixels"])
    encoded = Encoded(
        latents=tuple(tensors["latents"][:, None].to(device)),
        captions=("",) * count,
        digests=("",) * count,
        repeats=(1,) * count,
        caption_index=torch.arange(1, count + 1),
        text_states=tensors["text"].to(device),
    )
    return Workload(tensors["pixels"], tensors["tokens"], encoded)


# One entry --------------------------------------------------------------------------------------------------


class Runner(Protocol):
    """An entry's model, ready to step."""

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Take steps; returns losses and gradient norms, [count, N] each."""
        ...

    def race(self, count: int) -> list[float]:
        """Take steps as fast as it goes; returns seconds of each on a CPU, their mean on a GPU."""
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """As `Trajectory.weights`, now."""
        ...

    @property
    def precision(self) -> str:
        """The dtype of its U-Net: `fp32`, `bf16` or `fp16`."""
        ...


def build_runner(entry: Entry, conditions: Conditions, folder: Path) -> Runner:
    """Load base and workload and set the entry up."""
    device, tuning = torch.device(conditions.device), _tune(entry, conditions, folder)
    base = load_base(conditions.base_section(folder), device, tuning.precision if tuning else entry.precision)
    if entry.channels_last:
        base.unet.to(memory_format=torch.channels_last)
    if tuning and entry.best_attention:
        tuning.apply(base.unet)
    elif entry.kind == "ours":
        set_kernels(base.unet, {}, conditions.fast_paths.barred_kernels)
    workload = load_workload(folder, base.device)
    section = entry.section(conditions.batch_size)
    arms = [
        Arm(
            name=f"{index}",
            rank=rank,
            alpha=SCALE * rank,
            lr=LR,
            seed=SEED,
            kind=entry.adapter,
            min_rank=rank // 2 if entry.adapter == "tlora" else None,
        )
        for index, rank in enumerate(entry.ranks)
    ]
    bank = AdapterBank(base.components, resolve_section(base.components, AdapterSection(), arms), arms)
    match entry.kind:
        case "ours":
            return _Ours(base, bank, workload, section)
        case "reference":
            return _Peer(base, workload, section, ReferenceStep(base, bank, section))
        case "kohya":
            return _Peer(base, workload, section, KohyaStep(base, bank, section, Path(conditions.peers_dir)))
        case "peft":
            assert entry.recipe is not None
            return _Peer(base, workload, section, PeftStep(base, bank, section, entry.recipe))
        case "torch":
            return _Peer(base, workload, section, FullStep(base, bank, section))


def tune_all(entries: Sequence[Entry], conditions: Conditions, folder: Path) -> None:
    """Time what the entries leave to tuning, so that they find it known, as all starts of a study but the
    first do.

    Steps of a process that has tuned itself were found 7 to 10 % slower on a CPU (EXPERIMENTS.md): call it in
    another one.
    """
    for entry in entries:
        torch.set_num_threads(threads_of(entry, conditions))
        _tune(entry, conditions, folder)


def _tune(entry: Entry, conditions: Conditions, folder: Path) -> Tuning | None:
    """What `lorascope study` would find at its start, where the entry leaves something to it."""
    if entry.precision != "auto" and not entry.best_attention:
        return None
    configs, batch = read_configs(conditions.base_section(folder)), conditions.batch_size * len(entry.ranks)
    workload = build_workload(configs, conditions.resolution_px, batch, batch)
    device = torch.device(conditions.device)
    return tune(configs["unet"], workload, device, entry.precision, fast_paths=conditions.fast_paths)


class _Peer:
    def __init__(self, base: Base, workload: Workload, section: TrainSection, step: Step) -> None:
        self.device, self.step, self.number = base.device, step, 0
        self.precision = _name_of(base.unet.dtype)
        self.batches = [workload.batch(number, base, section, SEED) for number in range(_KEPT_BATCHES)]

    def _next(self) -> torch.Tensor:
        batch = self.batches[self.number % len(self.batches)]
        self.number += 1
        return self.step.step(batch)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        rows = [(float(self._next()), gradient_norm(self.step)) for _ in range(count)]
        losses, norms = np.array(rows).reshape(-1, 2).T
        return losses[:, None], norms[:, None]

    def race(self, count: int) -> list[float]:
        return timed(self._next, count, self.device)

    def weights(self) -> dict[str, torch.Tensor]:
        parts = {
            f"{name}.{part}": weight
            for name, own in self.step.weights.items()
            for part, weight in own.items()
        }
        return {name: weight.detach().float().cpu().clone()[None] for name, weight in parts.items()}


class _Ours:
    """The real `Trainer`."""

    def __init__(self, base: Base, bank: AdapterBank, workload: Workload, section: TrainSection) -> None:
        self.bank = bank.attach()
        self.trainer = Trainer(base, bank, workload.encoded, section)
        self.stop = 0
        self.records = self.trainer.run(lambda step: step == self.stop)
        self.device, self.precision = base.device, _name_of(base.unet.dtype)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        self.stop = self.trainer.step + count
        records = [next(self.records) for _ in range(count)]
        return np.array([record.losses for record in records]), np.array(
            [record.grad_norms for record in records]
        )

    def race(self, count: int) -> list[float]:
        self.stop = self.trainer.step + count
        return timed(lambda: next(self.records), count, self.device)

    def weights(self) -> dict[str, torch.Tensor]:
        parts: dict[str, torch.Tensor] = {}
        for name, layer in self.bank.layers.items():
            if isinstance(layer, DifferenceLayer):
                plain = layer.layer
                parts |= {
                    f"{name}.{part}": (getattr(plain, part).float() + leaf)[None]
                    for part, leaf in layer.leaves[0].items()
                }
                continue
            parts |= {f"{name}.down": layer.down, f"{name}.up": layer.up}
            if layer.magnitudes is not None:
                parts[f"{name}.magnitude"] = layer.magnitudes.values
        return {name: weight.detach().cpu().clone() for name, weight in parts.items()}


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def count_flops(runner: Runner) -> int:
    """FLOPs (two a multiply-add) of one step's matrix products and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        runner.take(1)
    return int(counter.get_total_flops())


# Its process ------------------------------------------------------------------------------------------------


def elsewhere(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of its own, whose memory is given back when it ends; raises `LaneError` if
    it fails.
    """
    context: Any = multiprocessing.get_context(_START_METHOD)
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise LaneError(f"{function.__name__} ended with code {process.exitcode}", process.exitcode == -9)


class LaneError(Exception):
    """An entry stopped; `out_of_memory` says whether for want of memory."""

    def __init__(self, reason: str, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory


class Lane:
    """An entry in a process of its own, which waits between commands; `ready` returns once it has imported
    what it needs.
    """

    def __init__(self, entry: Entry, conditions: Conditions, folder: Path, place: int = 0) -> None:
        self.entry = entry
        context: Any = multiprocessing.get_context(_START_METHOD)
        self._connection, theirs = context.Pipe()
        self._weights_path = folder / f"{entry.key}-{place}.safetensors"
        self._process = context.Process(
            target=_serve, args=(theirs, entry, conditions, folder, self._weights_path), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, command: str, *arguments: Any) -> Any:
        """Have a command done and wait for its result; raises `LaneError`."""
        self.send(command, *arguments)
        return self.receive()

    def send(self, command: str, *arguments: Any) -> None:
        """Start a command: `ready`, `build`, `take`, `race`, `flops`, `matmul`, `memory`."""
        self._connection.send((command, arguments))

    def receive(self) -> Any:
        """The result of the command; raises `LaneError`."""
        try:
            done, result = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise LaneError(
                f"its process ended with code {self._process.exitcode}", self._process.exitcode == -9
            ) from None
        if not done:
            raise LaneError(*result)
        return result

    def trajectory(self, num_steps: int) -> Trajectory:
        """The entry's next steps."""
        losses, norms = self.ask("take", num_steps)
        return Trajectory(losses, norms, safetensors.torch.load_file(self._weights_path))

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._connection.close()
        self._process.terminate()
        self._process.join()


def _serve(
    connection: Connection, entry: Entry, conditions: Conditions, folder: Path, weights_path: Path
) -> None:
    """What a lane's process does: commands, one after another, until the other side closes."""
    handlers = _handlers(entry, conditions, folder, weights_path)
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            result = (True, handlers[command](*arguments))
        except Exception as error:  # any fault of a library is the entry's result
            result = (False, (f"{type(error).__name__}: {first_line(error)}", is_out_of_memory(error)))
        connection.send(result)


def _handlers(
    entry: Entry, conditions: Conditions, folder: Path, weights_path: Path
) -> Mapping[str, Callable[..., Any]]:
    threads = threads_of(entry, conditions)
    torch.set_num_threads(threads)
    device = torch.device(conditions.device)
    if device.type == "cuda" and entry.recipe is not None and entry.recipe.cached:
        # a careful user's choice for fp32 adapters beside a bf16 base
        torch.set_float32_matmul_precision("high")
    runners: list[Runner] = []

    def build() -> tuple[float, str]:
        started = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        runners.append(build_runner(entry, conditions, folder))
        return time.perf_counter() - started, runners[0].precision

    def take(count: int) -> tuple[np.ndarray, np.ndarray]:
        with full_fp32() if entry.kind == "reference" else nullcontext():
            figures = runners[0].take(count)
        save_tensors(
            weights_path, {name: weight.contiguous() for name, weight in runners[0].weights().items()}, {}
        )
        return figures

    def memory() -> tuple[int, str, int]:
        peak, kind = peak_memory(device)
        return peak, kind, torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0

    return {
        "ready": lambda: threads,
        "build": build,
        "take": take,
        "race": lambda count: runners[0].race(count),
        "flops": lambda: count_flops(runners[0]),
        "matmul": lambda dtype: matmul_flops(device, getattr(torch, dtype)),
        "memory": memory,
    }
