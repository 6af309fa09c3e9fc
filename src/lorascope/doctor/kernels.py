"""Every kernel of attention against the formula.

The kernel that is looked at is an argument, so that a test can plant a fault in it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lorascope.base.attention import KERNELS, Kernel, Shape, attend, padded_head_dims
from lorascope.doctor.findings import (
    ATTENTION,
    Finding,
)
from lorascope.doctor.judging import excess, judge
from lorascope.errors import first_line
from lorascope.machine.memory import is_out_of_memory
from lorascope.seeding import seeded

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# of one attention, forward: as many heads as this allows
_ATTENTION_FLOPS = {"cpu": 2e8, "mps": 2e9, "cuda": 4e10}
# Kernels add in another order and round elsewhere than the plain formula does in the same dtype.
# flash-attention's own tests allow twice the plain formula's largest error in outputs, and three times that
# in gradients; one epsilon is for results that the plain formula happens to round right.
_ATTENTION_FACTOR = 4.0


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
                if kernel.name not in worst or excess(finding) > excess(worst[kernel.name]):
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
    return max(findings, key=excess)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
