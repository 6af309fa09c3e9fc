"""Attention: every kernel equals diffusers' processor, outputs and gradients; the choice goes by shape
alone.
"""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor2_0

from lorascope.base.attention import (
    AttentionProcessor,
    Kernel,
    Shape,
    attend,
    attention_layers,
    barred_kernels,
    default_kernel,
    set_kernels,
)
from lorascope.base.loading import Base

EXACT = 1e-12  # float64: 2.2e-16, times some for sums of a few hundred products through a dozen layers
ON_CPU = [Kernel(), Kernel("sdpa", 16), Kernel("flash"), Kernel("flash", 64), Kernel("plain")]


def make_layer(cross_width: int | None) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=20, cross_attention_dim=cross_width, heads=2, dim_head=10).eval().double()


def outputs(layer: Attention, processor: object, context: torch.Tensor | None) -> list[torch.Tensor]:
    """The layer's output, and the gradients of all its weights and of its input."""
    layer.set_processor(processor)
    x = torch.randn(3, 30, 20, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    out = layer(x, context)
    weights = list(layer.parameters())
    return [
        out,
        *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), [x, *weights]),
    ]


@pytest.mark.parametrize("kernel", ON_CPU, ids=str)
@pytest.mark.parametrize("cross_width", [None, 12], ids=["self", "cross"])
def test_every_kernel_equals_diffusers(kernel: Kernel, cross_width: int | None) -> None:
    layer = make_layer(cross_width)
    context = (
        None
        if cross_width is None
        else torch.randn(3, 7, cross_width, generator=torch.Generator().manual_seed(2)).double()
    )
    shape = Shape(30, 30 if context is None else 7, heads=2, head_dim=10, gradients=True)
    theirs = outputs(layer, AttnProcessor2_0(), context)
    for ours, reference in zip(
        outputs(layer, AttentionProcessor({shape: kernel}), context), theirs, strict=True
    ):
        assert (ours - reference).norm() <= EXACT * reference.norm()


@pytest.mark.parametrize("kernel", ON_CPU, ids=str)
def test_half_precision_is_as_exact_in_every_kernel(kernel: Kernel) -> None:
    """bf16 keeps 8 bits of a number: every kernel's error is that of five roundings, 2^-9 each, of query,
    key, value, attention and output.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, tokens, 10, generator=generator) for tokens in (30, 7, 7))
    exact = attend(Kernel(), query, key, value)
    rounded = attend(kernel, *(part.bfloat16() for part in (query, key, value)))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("name", ["efficient", "cudnn"])
def test_a_kernel_that_is_not_there_raises(name: str) -> None:
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="[Nn]o (viable|available)"):
        attend(Kernel(name), query, query, query)


def test_an_unknown_shape_gets_the_kernel_of_the_nearest() -> None:
    near, far, cross = Kernel("flash"), Kernel("efficient"), Kernel("plain")
    processor = AttentionProcessor(
        {
            Shape(1024, 1024, 8, 40, True): near,
            Shape(64, 64, 8, 40, True): far,
            Shape(1024, 77, 8, 40, True): cross,
        }
    )

    def kernel(shape: Shape) -> Kernel:
        return processor.kernel(shape, "cpu", torch.float32)

    assert kernel(Shape(960, 960, 8, 40, True)) == near
    assert kernel(Shape(100, 100, 8, 40, True)) == far
    assert kernel(Shape(960, 77, 8, 40, True)) == cross
    assert kernel(Shape(960, 960, 8, 40, False)) == Kernel()  # nothing was timed without gradients
    assert kernel(Shape(960, 960, 8, 80, True)) == Kernel()


def test_half_precision_on_a_cpu_trains_plainly_where_nothing_was_timed() -> None:
    assert default_kernel("cpu", torch.bfloat16, gradients=True) == Kernel("plain")
    assert default_kernel("cpu", torch.bfloat16, gradients=False) == Kernel()
    assert default_kernel("cpu", torch.float32, gradients=True) == Kernel()
    assert default_kernel("cuda", torch.bfloat16, gradients=True) == Kernel()


def test_whether_gradients_are_wanted_is_seen(base: Base) -> None:
    """Recorded over a pass of the whole U-Net: none where grad mode is off, or nothing asks for them."""
    seen: set[Shape] = set()

    class Recorder(AttentionProcessor):
        def kernel(self, shape: Shape, device_type: str, dtype: torch.dtype) -> Kernel:
            seen.add(shape)
            return Kernel()

    for layer in attention_layers(base.unet):
        layer.set_processor(Recorder({}))
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    base.unet(x, 1, text)
    assert {(shape.queries, shape.keys) for shape in seen} == {(64, 64), (64, 77), (16, 16), (16, 77)}
    assert not any(shape.gradients for shape in seen)
    seen.clear()
    with torch.no_grad():
        base.unet(x.requires_grad_(), 1, text)
    assert not any(shape.gradients for shape in seen)
    base.unet(x, 1, text)
    assert sum(shape.gradients for shape in seen) == 4


def test_the_whole_unet_equals_diffusers_and_its_copies_keep_the_kernels(exact_base: Base) -> None:
    base = exact_base
    theirs = copy.deepcopy(base.unet)
    theirs.set_attn_processor(AttnProcessor2_0())
    x, text = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 77, 32).double()
    with torch.no_grad():
        reference = theirs(x, 500, text).sample
        assert torch.equal(
            base.unet(x, 500, text).sample, reference
        )  # the same calls where nothing was chosen
        set_kernels(
            base.unet,
            {Shape(64, 64, 2, 8, False): Kernel("plain"), Shape(64, 77, 2, 8, False): Kernel("sdpa", 64)},
        )
        own = base.unet(x, 500, text).sample
        assert not torch.equal(own, reference) and (own - reference).norm() <= EXACT * reference.norm()
        assert torch.equal(copy.deepcopy(base.unet)(x, 500, text).sample, own)


def test_attention_of_other_kinds_keeps_its_processor() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("SimpleCrossAttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    set_kernels(unet, {})
    for name, processor in unet.attn_processors.items():
        kind = (
            AttnAddedKVProcessor2_0
            if "down_blocks.0" in name
            else AttentionProcessor
            if "transformer" in name
            else AttnProcessor2_0
        )
        assert isinstance(processor, kind), name
    with torch.no_grad():
        assert unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 8)).sample.isfinite().all()


def test_compiled_attention_equals_eager() -> None:
    """The choice is by shapes alone, so torch.compile traces it without a break."""
    layer = make_layer(None)
    layer.set_processor(AttentionProcessor({Shape(30, 30, 2, 10, True): Kernel("flash", 16)}))
    x = torch.randn(3, 30, 20).double().requires_grad_()
    compiled = torch.compile(layer.processor, backend="aot_eager", fullgraph=True)
    assert (compiled(layer, x) - layer(x)).norm() <= EXACT * layer(x).norm()


def test_kernels_say_what_they_are() -> None:
    assert str(Kernel("cudnn", 64)) == "cudnn padded to 64" and str(Kernel()) == "sdpa"


def test_a_barred_kernel_is_never_taken(base: Base) -> None:
    """Neither where it was timed, nor for a like shape, nor as torch's choice where nothing was timed."""
    timed = Shape(64, 64, 2, 8, True)
    processor = AttentionProcessor({timed: Kernel("flash", 16)}, {"flash", "sdpa"})
    for shape in (timed, timed._replace(queries=16, keys=16), timed._replace(keys=77)):
        assert processor.kernel(shape, "cuda", torch.bfloat16) == Kernel("plain")
    set_kernels(base.unet, {}, {"sdpa"})
    [own] = set(base.unet.attn_processors.values())
    assert isinstance(own, AttentionProcessor) and own.barred == {"sdpa"} == barred_kernels(base.unet)
    base.unet.set_attn_processor(AttnProcessor2_0())  # diffusers' own, which nothing is barred from
    assert barred_kernels(base.unet) == frozenset()
