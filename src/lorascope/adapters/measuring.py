"""The figures of a file's modules: size, rank and faults of each update."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from lorascope.adapters.file_content import Content
from lorascope.adapters.file_modules import FileModule, num_elements
from lorascope.adapters.lowrank import effective_rank, singular_values
from lorascope.adapters.modules import FullModule, LokrModule, LoraModule, Module
from lorascope.adapters.parsing import parse_adapter
from lorascope.adapters.recognition import ModuleFacts, recognise_modules
from lorascope.base.weights import count_not_finite
from lorascope.errors import WeightsError, first_line

_NUMBERS_AT_ONCE = 2**25  # in memory; a full matrix of Stable Diffusion v1.5's largest layer has 2.9e7
_TOO_LARGE = "too large or too many for an adapter: not measured"
_READ = ("LoRA", "LoHa", "LoKr", "full difference", "norm difference")  # kinds whose update is computed
_MAX_MODULES = 4000  # SDXL's adapters have at most some 2,000


def measure_modules(modules: Mapping[str, FileModule], content: Content) -> tuple[ModuleFacts, ...]:
    """The figures of every module; the tensors of a few modules are in memory at a time."""
    facts = {name: replace(own, fault=_TOO_LARGE) for name, own in recognise_modules(modules).items()}
    small = [module for module in modules.values() if _num_numbers(module) <= _NUMBERS_AT_ONCE]
    for group in _groups(small[:_MAX_MODULES]):
        try:
            tensors = content.tensors([module.name + ending for module in group for ending in module.parts])
        except WeightsError as error:
            facts.update(
                {module.name: replace(facts[module.name], fault=first_line(error)) for module in group}
            )
            continue
        for module in group:
            own = {ending: tensors[module.name + ending] for ending in module.parts}
            facts[module.name] = _measure(replace(facts[module.name], fault=None), module, own, content)
    return tuple(facts.values())


def _num_numbers(module: FileModule) -> int:
    return sum(map(num_elements, module.parts.values()))


def _groups(modules: Iterable[FileModule]) -> Iterator[list[FileModule]]:
    """As many modules at a time as memory is meant for: each group costs one reading of the file's header."""
    group: list[FileModule] = []
    total = 0
    for module in modules:
        if group and total + _num_numbers(module) > _NUMBERS_AT_ONCE:
            yield group
            group, total = [], 0
        group.append(module)
        total += _num_numbers(module)
    if group:
        yield group


def _measure(
    facts: ModuleFacts, module: FileModule, tensors: Mapping[str, torch.Tensor], content: Content
) -> ModuleFacts:
    bad = sum(map(count_not_finite, tensors.values()))
    facts = replace(facts, num_not_finite=bad)
    if any(tensor.is_complex() for tensor in tensors.values()):
        return replace(facts, fault="it holds complex numbers")
    if facts.kind not in _READ:
        factors = [tensor for ending, tensor in tensors.items() if re.match(r"\.(oft_|b[12]\.)", ending)]
        return replace(
            facts, is_zero=any(not tensor.float().any() for tensor in factors) and not facts.is_dora
        )
    parsed, fault = _as_adapter(module, tensors, content)
    if parsed is None:
        return replace(facts, fault=fault)
    if parsed.has_scale:
        facts = replace(facts, rank=parsed.rank, alpha=parsed.alpha, scale=parsed.scale)
    if bad:
        return facts
    if isinstance(parsed, LoraModule):
        return _with_norms(facts, parsed)
    if parsed.num_numbers > _NUMBERS_AT_ONCE:
        return replace(facts, fault=_TOO_LARGE)
    norm, count = _norm(parsed), math.prod(parsed.matrix_shape)
    return replace(facts, norm=norm, rms=norm / count**0.5, is_zero=norm == 0)


def _as_adapter(
    module: FileModule, tensors: Mapping[str, torch.Tensor], content: Content
) -> tuple[Module | None, str | None]:
    """The module with its alpha, from wherever the file states it; or why it is none."""
    named = {module.name + ending: tensor for ending, tensor in tensors.items()}
    parsed = parse_adapter(named, content.metadata, content.config)
    if parsed.modules:
        return next(iter(parsed.modules.values())), None
    # A name of another model: the same tensors under a name that is known give the same figures.
    stand_in = (
        "lora_unet_conv_in"
        if any(len(shape) == 4 for shape in module.factors or ())
        else "lora_unet_time_embedding_linear_1"
    )
    kohya = dict(zip(module.spelling or (), (".lora_down.weight", ".lora_up.weight"), strict=False))
    parsed = parse_adapter(
        {stand_in + kohya.get(ending, ending): tensor for ending, tensor in tensors.items()}, {}, None
    )
    found = next(iter(parsed.modules.values()), None)
    return found, None if found else f"its tensors make no {module.kind}: " + (
        parsed.faults[0].partition(": ")[2] if parsed.faults else "unknown shapes"
    )


def _with_norms(facts: ModuleFacts, lora: LoraModule) -> ModuleFacts:
    values = singular_values(lora)
    norm = float(values.square().sum().sqrt())
    elements = lora.up.shape[0] * lora.full_down()[0].numel()
    used = effective_rank(values)
    # A magnitude without a direction still scales the base's weights.
    is_zero = norm == 0 and not facts.is_dora
    return replace(
        facts,
        norm=norm,
        rms=norm / elements**0.5 if not facts.is_dora else None,
        rank_used=used,
        is_zero=is_zero,
    )


def _norm(module: Module) -> float:
    """Frobenius norm of the update, in float64; of a full difference with the bias's."""
    if isinstance(module, LokrModule):  # that of a Kronecker product is the product of both
        first, second = (
            float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in module.whole()
        )
        return first * second * abs(module.scale)
    norm = float(torch.linalg.vector_norm(module.update(), dtype=torch.float64))
    if isinstance(module, FullModule) and module.bias is not None:
        norm = math.hypot(norm, float(torch.linalg.vector_norm(module.bias.float(), dtype=torch.float64)))
    return norm
