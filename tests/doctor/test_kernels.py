"""Faults planted into kernels of attention are found, and right kernels left alone."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from conftest import needs_bf16_attention
from lorascope.base.attention import KERNELS, Kernel, Shape, attend
from lorascope.doctor import kernels
from lorascope.doctor.findings import Finding
from lorascope.doctor.kernels import check_attention

CPU = torch.device("cpu")
SHAPES = [Shape(64, 64, 2, 20, True), Shape(64, 77, 2, 20, True)]
BOTH = [torch.float32, torch.bfloat16]


class _Spoiled(torch.autograd.Function):
    """A tensor whose gradient comes back wrong."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, spoil: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.spoil = spoil
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.spoil(gradient), None


def last_is_nan(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[..., -1, -1] = math.nan
    return x


def wrong_gradients(spoil: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Padded flash attention to text, whose output is right and one of whose gradients is not."""

    def attend_wrongly(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if kernel.name == "flash" and kernel.head_dim is not None and k.shape[2] == 77:
            k = _Spoiled.apply(k, spoil)
        return attend(kernel, q, k, v)

    return attend_wrongly


def wrong_output(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Flash attention that leaves the last of 77 keys out."""
    cut = kernel.name == "flash" and k.shape[2] == 77
    return attend(kernel, q, k[:, :, :76], v[:, :, :76]) if cut else attend(kernel, q, k, v)


def wrong_in_drawing(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Flash attention that is wrong without gradients alone."""
    out = attend(kernel, q, k, v)
    return out if kernel.name != "flash" or out.requires_grad else out * 1.1


def by_kernel(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.check.removeprefix("attention "): finding for finding in findings}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16_attention)])
@pytest.mark.parametrize(
    ("planted", "place"),
    [
        (wrong_gradients(lambda x: x * 1.1), "gradient of key, 64x77"),
        (wrong_gradients(last_is_nan), "gradient of key, 64x77"),
        (wrong_output, "64x77"),
        (wrong_in_drawing, "output without gradients"),
    ],
)
def test_a_kernel_with_wrong_numbers_is_found(planted: Any, place: str, dtype: torch.dtype) -> None:
    found = by_kernel(check_attention(SHAPES, [dtype], CPU, planted))
    assert found["flash"].status == "wrong" and place in found["flash"].told
    assert {name for name, finding in found.items() if finding.status == "wrong"} == {"flash"}


@needs_bf16_attention
def test_right_kernels_are_far_from_their_tolerance() -> None:
    """In both dtypes and with three padded head dimensions."""
    found = by_kernel(check_attention(SHAPES, BOTH, CPU))
    assert list(found) == list(KERNELS)
    assert "worst of 12" in found["sdpa"].told  # 2 shapes, 2 dtypes; 20, 32 and 64 in each head
    for name in ("sdpa", "flash", "plain"):
        assert found[name].status == "ok" and found[name].error is not None
    assert found["cudnn"] == Finding("attention cudnn", "not checked", "not on this device")


def test_a_kernel_that_runs_out_of_memory_is_not_called_absent() -> None:
    def run_out(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        check_attention(SHAPES, BOTH, CPU, run_out)


def test_large_attention_is_checked_on_fewer_heads() -> None:
    inputs, heads = kernels._attention_inputs(Shape(4096, 4096, 8, 40, True), torch.float32, CPU)
    assert heads == 1 and inputs[0].shape == (1, 4096, 40)
    inputs, heads = kernels._attention_inputs(Shape(64, 77, 8, 40, True), torch.float32, CPU)
    assert heads == 8 and inputs[1].shape == (2, 77, 320)
