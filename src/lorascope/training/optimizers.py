"""Optimizers over a bank's buffer, and the course of the learning rate."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from lorascope.adapters.adapted import leaf_of
from lorascope.adapters.bank import AdapterBank
from lorascope.adapters.targets import Target
from lorascope.arms import Arm
from lorascope.errors import ConfigError, first_line, shown
from lorascope.schema import StudyConfig
from lorascope.sections import TrainSection

_NOT_FOR_ADAPTERS = {
    "LBFGS": "needs several passes for a step",
    "SparseAdam": "takes sparse gradients only",
    "Optimizer": "is the base class",
}


def learning_rates(peaks: torch.Tensor, step: int, num_steps: int, section: TrainSection) -> torch.Tensor:
    """Rates [N] of the step with index `step` from 0: linear warm-up to `peaks` [N], then the section's
    schedule.

    `linear` and `cosine` reach 0 after the last of `num_steps` steps, as in diffusers.
    """
    warmup = section.warmup_steps
    if step < warmup:
        return peaks * ((step + 1) / (warmup + 1))
    progress = (step - warmup) / max(1, num_steps - warmup)
    match section.schedule:
        case "linear":
            return peaks * (1 - progress)
        case "cosine":
            return peaks * (0.5 * (1 + math.cos(math.pi * progress)))
        case _:
            return peaks


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) by torch's fused kernel over each row of a bank, one learning rate per
    adapter.

    Its moments lie in buffers like the bank's, and nothing of a step waits for the device.
    """

    is_recordable = True  # in a CUDA graph

    def __init__(self, bank: AdapterBank, section: TrainSection) -> None:
        self.bank, self.section = bank, section
        self.mean = torch.zeros_like(bank.parameters)
        self.square = torch.zeros_like(bank.parameters)
        self.counts = torch.zeros(len(bank.arms), device=bank.parameters.device)  # steps of each adapter
        self._columns = [_columns_by_lr_factor(bank, index) for index in range(len(bank.arms))]

    @torch.no_grad()
    def step(self, lrs: torch.Tensor, active: torch.Tensor) -> None:
        """One update with rates `lrs` float32 [N]; adapters that are not `active` bool [N] stay as they
        are.
        """
        bank, section, skipped = self.bank, self.section, (~active).float()
        for index, columns_by_factor in enumerate(self._columns):
            for factor, columns in columns_by_factor.items():
                parameters, gradients, means, squares = (
                    [buffer[index, span] for span in columns]
                    for buffer in (bank.parameters, bank.gradients, self.mean, self.square)
                )
                adamw(
                    parameters,
                    gradients,
                    means,
                    squares,
                    max_exp_avg_sqs=[],
                    state_steps=[self.counts[index].clone() for _ in columns],  # the kernel counts each up
                    lr=lrs[index] * factor,
                    found_inf=skipped[index],  # the kernel leaves everything as it is where this is 1
                    fused=True,
                    capturable=bank.parameters.is_cuda,
                    amsgrad=False,
                    beta1=section.betas[0],
                    beta2=section.betas[1],
                    weight_decay=section.weight_decay,
                    eps=section.eps,
                    maximize=False,
                )
        self.counts.add_(1 - skipped)

    def buffers(self) -> list[torch.Tensor]:
        """The tensors that a step changes, besides the bank's."""
        return [self.mean, self.square, self.counts]

    def state(self, index: int) -> dict[str, torch.Tensor]:
        """Everything that `load_state` needs of adapter `index`, as tensors."""
        bank = self.bank
        return {
            "mean": bank.unpadded(self.mean, index),
            "square": bank.unpadded(self.square, index),
            "count": self.counts[index],
        }

    def load_state(self, index: int, state: Mapping[str, torch.Tensor]) -> None:
        """Continue with adapter `index` from what `state` gave, in this bank or one of other adapters."""
        self.bank.load_unpadded(self.mean, index, state["mean"])
        self.bank.load_unpadded(self.square, index, state["square"])
        self.counts[index] = state["count"]


class TorchOptimizer:
    """An optimizer of torch.optim, or Prodigy: one of its own per adapter, over the adapter's matrices
    without padding.

    Raises `ConfigError` for a name that is not known or cannot be used, or arguments that it refuses.
    """

    is_recordable = False

    def __init__(self, bank: AdapterBank, section: TrainSection) -> None:
        kind = _optimizer_class(section.optimizer)
        self._optimizers = []
        for index, arm in enumerate(bank.arms):
            groups: dict[float, list[torch.Tensor]] = {}
            for target in bank.targets:
                layer, span = bank.layers[target.name], bank.spans[target.name]
                values, slopes = (
                    layer.views(buffer[index, span], index) for buffer in (bank.parameters, bank.gradients)
                )
                for name in target.parts(arm):
                    factor = _lr_factor(target, arm, name)
                    groups.setdefault(factor, []).append(leaf_of(values[name], slopes[name]))
            self._optimizers.append(_start(kind, groups, arm.lr, section))

    def step(self, lrs: torch.Tensor, active: torch.Tensor) -> None:
        """As `AdamW.step`; waits for the device once."""
        rates = torch.where(active, lrs, math.nan).tolist()  # one answer for both
        for optimizer, lr in zip(self._optimizers, rates, strict=True):
            if not math.isnan(lr):
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["factor"]
                optimizer.step()

    def buffers(self) -> list[torch.Tensor]:
        """As `AdamW.buffers`: none, each optimizer keeps its own."""
        return []

    def state(self, index: int) -> dict[str, torch.Tensor]:
        """As `AdamW.state`: what is not a tensor lies as JSON in bytes."""
        tensors, state = {}, self._optimizers[index].state_dict()
        plain: dict[str, Any] = {"groups": state["param_groups"], "state": {}}
        for parameter, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{parameter}.{name}"] = value.contiguous()
                else:
                    plain["state"].setdefault(str(parameter), {})[name] = value
        text = json.dumps(plain, default=_jsonable).encode()
        return {**tensors, "others": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    def load_state(self, index: int, state: Mapping[str, torch.Tensor]) -> None:
        """As `AdamW.load_state`."""
        plain = json.loads(bytes(state["others"].tolist()))
        values: dict[int, dict[str, Any]] = {
            int(parameter): dict(items) for parameter, items in plain["state"].items()
        }
        for key, tensor in state.items():
            if key != "others":
                parameter, _, name = key.partition(".")
                values.setdefault(int(parameter), {})[name] = tensor
        self._optimizers[index].load_state_dict({"state": values, "param_groups": plain["groups"]})


def build_optimizer(bank: AdapterBank, section: TrainSection) -> AdamW | TorchOptimizer:
    """The optimizer that `train.optimizer` names."""
    return AdamW(bank, section) if section.optimizer.lower() == "adamw" else TorchOptimizer(bank, section)


def check_optimizer(config: StudyConfig) -> None:
    """Take three steps of each arm's optimizer on matrices of its own, at the rates of all layers.

    Raises `ConfigError` for an optimizer that is not known, cannot be used or is not installed, for arguments
    or rates that it refuses, some only as it steps (Prodigy takes one rate for all layers), and for those
    that make weights infinite or NaN.
    """
    section = config.train
    if section.optimizer.lower() == "adamw":
        if section.optimizer_args:
            raise ConfigError(
                'train.optimizer_args: not for "adamw": set train.betas, train.eps and train.weight_decay'
            )
        return
    kind = _optimizer_class(section.optimizer)
    for arm in config.expand_arms():
        groups: dict[float, list[torch.Tensor]] = {}
        for lr in (arm.lr, *(group.lr or arm.lr for group in config.adapter.groups)):
            for ratio in (1.0, arm.lr_ratio):
                weight = torch.ones(2, 2, requires_grad=True)
                weight.grad = torch.ones_like(weight)
                groups[ratio * lr / arm.lr] = [weight]
        optimizer = _start(kind, groups, arm.lr, section)
        for group in optimizer.param_groups:
            group["lr"] = arm.lr * group["factor"]
        try:
            for _ in range(3):  # a momentum acts from the second on
                optimizer.step()
        except Exception as error:  # optimizers raise anything here
            raise ConfigError(
                f"train.optimizer = {section.optimizer!r}: {kind.__name__} cannot take a step with "
                f"these settings ({first_line(error)}): correct train.optimizer_args, or leave lr out "
                "of adapter.groups"
            ) from error
        if not all(weight.isfinite().all() for (weight,) in groups.values()):
            raise ConfigError(
                f"train.optimizer_args = {shown(section.optimizer_args)}: {kind.__name__} makes weights of 1 "
                f"infinite or NaN in three steps with them and lr = {arm.lr:g}: lower what is too large"
            )


def _start(
    kind: Any, groups: Mapping[float, Sequence[torch.Tensor]], lr: float, section: TrainSection
) -> Any:
    """An optimizer over weights by the factor that their learning rate has over `lr`."""
    try:
        return kind(
            [{"params": weights, "factor": factor} for factor, weights in groups.items()],
            lr=lr,
            **section.optimizer_args,
        )
    except Exception as error:  # optimizers raise anything here too
        raise ConfigError(
            f"train.optimizer_args = {shown(section.optimizer_args)}: {kind.__name__} refuses them "
            f"({first_line(error)}): see its documentation"
        ) from error


def _optimizer_class(name: str) -> Any:
    if name.lower() == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise ConfigError(
                'train.optimizer = "prodigy": its package is not installed: pip install "lorascope[prodigy]"'
            ) from error
        return Prodigy
    known = {
        item.__name__: item
        for item in vars(torch.optim).values()
        if isinstance(item, type) and issubclass(item, torch.optim.Optimizer)
    }
    found = next((item for title, item in known.items() if title.lower() == name.lower()), None)
    usable = sorted(set(known) - set(_NOT_FOR_ADAPTERS))
    if found is None:
        raise ConfigError(
            f"train.optimizer = {name!r}: must be adamw, prodigy or a torch.optim class: {', '.join(usable)}"
        )
    if found.__name__ in _NOT_FOR_ADAPTERS:
        raise ConfigError(
            f"train.optimizer = {name!r}: {_NOT_FOR_ADAPTERS[found.__name__]}: use one of {', '.join(usable)}"
        )
    return found


def _columns_by_lr_factor(bank: AdapterBank, index: int) -> dict[float, list[slice]]:
    """Columns of the bank's buffers by the factor that their learning rate has over the arm's; neighbours are
    joined.
    """
    columns: dict[float, list[slice]] = {}
    arm = bank.arms[index]
    for target in bank.targets:
        first = bank.spans[target.name].start
        for span, name in bank.layers[target.name].trained(index):
            start, end = first + span.start, first + span.stop
            known = columns.setdefault(_lr_factor(target, arm, name), [])
            if known and known[-1].stop == start:
                known[-1] = slice(known[-1].start, end)
            else:
                known.append(slice(start, end))
    return columns


def _lr_factor(target: Target, arm: Arm, name: str) -> float:
    """The factor that the learning rate of a part of a layer has over the arm's."""
    factor = target.lr(arm) / arm.lr
    return factor * arm.lr_ratio if name == "up" else factor


def _jsonable(value: Any) -> Any:
    """A number that is held as a tensor or NumPy scalar among an optimizer's settings."""
    return value.item()
