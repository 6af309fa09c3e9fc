"""Updates beside the base's weights: figures, intruders and their intervention, against dense references in
NumPy and against PEFT.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.bank import AdapterBank, Slice
from lorascope.adapters.lowrank import Target, resize
from lorascope.adapters.merge import merged_into
from lorascope.adapters.modules import LoraModule, Module
from lorascope.adapters.targets import resolve_targets
from lorascope.arms import Arm
from lorascope.base.loading import Base
from lorascope.console import track
from lorascope.diagnosis.weights import (
    decompose,
    leading_directions,
    measure_adapters,
    measure_layer,
    scale_intruders,
)
from lorascope.errors import AdapterError
from random_adapters import random_full, random_loha, random_lokr

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
# Of a few hundred products float64 leaves 1e-14, of a Gram matrix the same of the largest value's square.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = {"wide": (24, 40), "square": (32, 32), "tall": (40, 24), "convolution": (20, 6, 3, 3)}
SHAPES["tall convolution"] = (30, 2, 3, 3)


def base_weight(shape: tuple[int, ...]) -> torch.Tensor:
    """A weight whose singular values fall as a trained layer's do, so that its directions are its own."""
    draw = torch.Generator().manual_seed(3)
    u, _, v = torch.linalg.svd(
        torch.randn(shape, generator=draw, dtype=torch.float64).flatten(1), full_matrices=False
    )
    values = torch.arange(1, u.shape[1] + 1, dtype=torch.float64) ** -0.7
    return ((u * values) @ v).view(shape)


def random_module(
    shape: tuple[int, ...], rank: int = 4, alpha: float | None = 2.0, size: float = 0.1, seed: int = 0
) -> LoraModule:
    """In float64, so that dense references are met to its rounding."""
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=draw, dtype=torch.float64)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=draw, dtype=torch.float64)
    return LoraModule(down, up * size, alpha)


def dense(module: LoraModule) -> NDArray[np.float64]:
    """scale * B A as a matrix."""
    up, down = module.up.double().flatten(1).numpy(), module.full_down().double().flatten(1).numpy()
    return module.scale * (up @ down)


def dense_cosines(weight: torch.Tensor, module: LoraModule, count: int) -> NDArray[np.float64]:
    """The largest absolute cosine of each leading left singular vector of W + dW with those of W."""
    matrix = weight.flatten(1).numpy()
    before = np.linalg.svd(matrix, full_matrices=False)[0]
    after = np.linalg.svd(matrix + dense(module), full_matrices=False)[0]
    return np.abs(after.T @ before).max(axis=1)[:count]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_figures_are_those_of_the_dense_matrices(shape: tuple[int, ...]) -> None:
    weight, module = base_weight(shape), random_module(shape)
    found = measure_layer(Q, decompose(weight), module)
    values = np.linalg.svd(dense(module), compute_uv=False)
    norms = np.linalg.norm(weight.flatten(1).numpy()), np.linalg.norm(weight.flatten(1).numpy(), 2)
    assert (found.layer, found.rank, found.num_directions) == (Q, 4, 10)
    assert found.norm_ratio == pytest.approx(np.linalg.norm(values) / norms[0], rel=1e-10)
    assert found.spectral_ratio == pytest.approx(values[0] / norms[1], rel=1e-10)
    assert found.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-10)
    shares = np.cumsum(values**2) / (values**2).sum()
    assert found.rank_95 == int(np.argmax(shares >= 0.95)) + 1
    assert found.num_intruders == int((dense_cosines(weight, module, 10) < 0.5).sum())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
def test_leading_directions_are_those_of_the_dense_sum(shape: tuple[int, ...], size: float) -> None:
    weight, module = base_weight(shape), random_module(shape, size=size)
    found = leading_directions(decompose(weight), module, 5)
    u, values, v = np.linalg.svd(weight.flatten(1).numpy() + dense(module), full_matrices=False)
    np.testing.assert_allclose(found.values, values[:5], **EXACT)
    np.testing.assert_allclose(found.cosines, dense_cosines(weight, module, 5), **EXACT)
    for index in range(5):  # a triplet's sign is free
        pair = np.outer(found.left[:, index], found.right[:, index])
        np.testing.assert_allclose(pair, np.outer(u[:, index], v[index]), **EXACT)


def test_a_tucker_core_and_a_module_without_alpha_are_measured_as_what_they_add() -> None:
    draw = torch.Generator().manual_seed(1)
    module = LoraModule(
        torch.randn(3, 6, 1, 1, generator=draw),
        torch.randn(20, 3, 1, 1, generator=draw),
        None,
        torch.randn(3, 3, 3, 3, generator=draw),
    )
    weight = base_weight((20, 6, 3, 3))
    found = measure_layer(Q, decompose(weight), module)
    # a Tucker core is folded in fp32: 1.2e-7
    assert found.norm_ratio == pytest.approx(np.linalg.norm(dense(module)) / float(weight.norm()), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_other_kinds_are_measured_by_their_whole_update(shape: tuple[int, ...]) -> None:
    """As the LoRA of full rank with the same update; `update` multiplies in fp32, which both get."""
    draw = torch.Generator().manual_seed(2)
    base = decompose(base_weight(shape))
    for module in (
        random_loha(shape, 2, 0.1, draw),
        random_lokr(shape, 1, 0.1, draw),
        random_full(shape, draw),
    ):
        update = module.update().double().reshape(module.matrix_shape)
        identity = torch.eye(len(update), dtype=torch.float64)
        same = LoraModule(update, identity, None)
        found, expected = measure_layer(Q, base, module), measure_layer(Q, base, same)
        assert found.rank == module.rank and found.rank_95 == expected.rank_95
        assert (found.num_directions, found.num_intruders) == (
            expected.num_directions,
            expected.num_intruders,
        )
        for name in ("norm_ratio", "spectral_ratio", "stable_rank"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-8)


def test_norms_are_not_measured_and_other_kinds_not_edited(base: Base) -> None:
    draw = torch.Generator().manual_seed(2)
    modules: dict[str, Module] = {
        "unet.conv_norm_out": random_full((16,), draw),
        Q: random_full((16, 16), draw),
    }
    full = {"full": Adapter(modules, "bank", {})}
    assert [figures.layer for figures in measure_adapters(base.components, full)["full"]] == [Q]
    with pytest.raises(AdapterError, match="unet.conv_norm_out: is a full difference, not a product of two"):
        scale_intruders(base.components, full)


def test_an_update_along_a_vector_of_the_base_is_no_intruder_and_a_strange_one_is() -> None:
    weight = base_weight((24, 40))
    u, _, v = torch.linalg.svd(weight, full_matrices=False)
    known = LoraModule(v[:1], u[:, :1] * 3, 1.0)
    base = decompose(weight)
    assert measure_layer(Q, base, known).num_intruders == 0
    mixed = u @ torch.ones(24, 1, dtype=torch.float64) / 24**0.5  # cosine 0.2 with every vector
    strange = leading_directions(base, LoraModule(v[:1], mixed * 30, 1.0))
    assert strange.intruders().tolist() == [True] + [False] * 9
    assert float(strange.cosines[0]) == pytest.approx(24**-0.5, abs=0.05)
    assert not strange.intruders(threshold=0.1).any()


def test_nothing_added_is_no_intruder_and_has_no_rank() -> None:
    found = measure_layer(Q, decompose(base_weight((24, 40))), random_module((24, 40), size=0.0))
    assert (found.norm_ratio, found.spectral_ratio, found.stable_rank, found.rank_95) == (0, 0, 0, 0)
    assert (found.num_directions, found.num_intruders) == (10, 0)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_base_weight_of_zeros_has_no_ratio_and_all_that_is_added_is_strange(shape: tuple[int, int]) -> None:
    found = measure_layer(Q, decompose(torch.zeros(shape)), random_module(shape, rank=3))
    assert (found.norm_ratio, found.spectral_ratio) == (None, None)
    assert (found.num_directions, found.num_intruders) == (3, 3)
    assert measure_layer(Q, decompose(torch.zeros(shape)), random_module(shape, size=0.0)).num_directions == 0


def test_a_weight_of_low_rank_has_no_directions_beyond_it() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0] + [0.0] * 10, dtype=torch.float64))
    up = torch.zeros(12, 1, dtype=torch.float64)
    up[5] = 1.0  # a direction that W does not have at all
    found = leading_directions(decompose(weight), LoraModule(up.T.clone(), up, 1.0))
    np.testing.assert_allclose(found.values, [3, 2, 1], **EXACT)
    np.testing.assert_allclose(found.cosines, [1, 1, 0], **EXACT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("factor", [0.75, 0.0, 1.0])
def test_scaled_intruders_are_the_dense_difference(shape: tuple[int, ...], factor: float) -> None:
    weight, module = base_weight(shape), random_module(shape, size=1.0)
    components, path = layer_of(weight)
    scaled = scale_intruders(components, {"arm": Adapter({path: module}, "bank", {})}, factor)
    new = scaled["arm"].modules[path]
    matrix = weight.flatten(1).numpy()
    u, values, v = np.linalg.svd(matrix + dense(module), full_matrices=False)
    intruders = np.flatnonzero(dense_cosines(weight, module, 10) < 0.5)
    assert len(intruders) > 0
    expected = dense(module) - (1 - factor) * (u[:, intruders] * values[intruders]) @ v[intruders]
    np.testing.assert_allclose(dense(new), expected, **EXACT)
    assert (new.rank, new.scale, new.weight_shape) == (14, module.scale, shape)
    assert new.update().shape == weight.shape


def layer_of(weight: torch.Tensor) -> tuple[dict[str, torch.nn.Module], str]:
    """A model of one layer, and the layer's path."""
    layer: torch.nn.Module = (
        torch.nn.Linear(weight.shape[1], weight.shape[0])
        if weight.ndim == 2
        else torch.nn.Conv2d(weight.shape[1], weight.shape[0], 3)
    )
    layer.weight = torch.nn.Parameter(weight)
    return {"unet": torch.nn.ModuleDict({"conv_in": layer})}, "unet.conv_in"


def test_the_factor_lies_between_none_and_all() -> None:
    with pytest.raises(ValueError, match=r"factor = 1.5: must be in \[0, 1\]"):
        scale_intruders({}, {}, 1.5)


def test_a_module_without_strength_stays_one() -> None:
    weight, module = base_weight((24, 40)), random_module((24, 40), alpha=0.0)
    components, path = layer_of(weight)
    new = scale_intruders(components, {"arm": Adapter({path: module}, "bank", {})})["arm"].modules[path]
    assert not new.update().any() and new.up.isfinite().all()


def random_adapter(base: Base, targets: tuple[str, ...], rank: int, size: float, seed: int = 0) -> Adapter:
    """For layers of the tiny base, in float32 as training leaves them."""
    modules = {
        f"unet.{target.path}": random_module(
            tuple(base.unet.get_submodule(target.path).weight.shape),  # type: ignore[arg-type]
            rank,
            2.0 * rank,
            size,
            seed + index,
        )
        for index, target in enumerate(resolve_targets(base.unet, targets))
    }
    return Adapter(
        {
            path: module.with_tensors({name: part.float() for name, part in module.tensors().items()})
            for path, module in modules.items()
        },
        "bank",
        {},
    )


def test_adapters_are_measured_together_as_alone_each_with_its_own_layers(base: Base) -> None:
    attention = random_adapter(base, ("to_q", "to_v"), 4, 0.1)
    others = random_adapter(base, ("to_v", "proj_in", "conv1"), 2, 0.1, seed=50)
    text = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
    others = replace(others, modules={text: random_module((64, 32)), **others.modules})
    with track("weights", 0, "layers") as tally:
        together = measure_adapters(base.components, {"a": attention, "b": others}, tally=tally)
    assert tally.completed == len(attention.modules | others.modules)
    assert [figure.layer for figure in together["b"]] == list(others.modules)
    assert together["a"] == measure_adapters(base.components, {"a": attention})["a"]
    state = base.unet.state_dict()
    for figure in [*together["a"], *together["b"][1:]]:
        adapter = attention if figure in together["a"] else others
        expected = np.linalg.norm(dense(adapter.modules[figure.layer]))
        weight = state[f"{figure.layer.removeprefix('unet.')}.weight"]
        assert figure.norm_ratio == pytest.approx(expected / float(weight.norm()), rel=1e-5)
    mlp = next(part for name, part in base.text_encoder.named_parameters() if "1.mlp.fc1.weight" in name)
    expected = np.linalg.norm(dense(others.modules[text]))
    assert together["b"][0].norm_ratio == pytest.approx(expected / float(mlp.norm()), rel=1e-5)


def test_the_95_percent_rank_is_where_a_cut_by_energy_cuts(base: Base) -> None:
    adapter = random_adapter(base, ("to_q",), 8, 0.1)
    cut = resize(adapter, Target(energy=0.95)).adapter
    for figure in measure_adapters(base.components, {"arm": adapter})["arm"]:
        assert cut.modules[figure.layer].rank == figure.rank_95 < figure.rank


@pytest.mark.parametrize("size", [0.02, 0.2])
def test_intruders_and_their_intervention_are_pefts(exact_base: Base, size: float) -> None:
    """PEFT counts as many in every layer, and its new adapter is ours cut back to the old rank."""
    base, targets = exact_base, ("to_q", "to_k", "ff.net.0.proj", "ff.net.2")
    adapter = random_adapter(base, targets, 4, size)
    model = get_peft_model(
        copy.deepcopy(base.unet), LoraConfig(r=4, lora_alpha=8, target_modules=list(targets))
    ).double()
    state = {}
    for path, module in adapter.modules.items():
        name = f"base_model.model.{path.removeprefix('unet.')}"
        state[f"{name}.lora_A.default.weight"] = module.down.double()
        state[f"{name}.lora_B.default.weight"] = module.up.double()
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    said: list[str] = []
    reduce_intruder_dimension(model, mitigation_lambda=0.75, logging_sink=said.append)
    theirs = {
        line.split(": ")[0].removeprefix("base_model.model."): 0 if "No" in line else int(line.split()[-1])
        for line in said
        if "ntruders" in line
    }
    ours = measure_adapters(base.components, {"arm": adapter})["arm"]
    assert {figure.layer.removeprefix("unet."): figure.num_intruders for figure in ours} == theirs
    assert len(set(theirs.values())) > 1 and len(theirs) == len(adapter.modules)
    cut = resize(scale_intruders(base.components, {"arm": adapter})["arm"], Target(rank=4)).adapter
    for path, module in cut.modules.items():
        layer = model.get_submodule(f"base_model.model.{path.removeprefix('unet.')}")
        expected = layer.get_delta_weight("intruder_reduced").detach()
        # factors are fp32, of rounding 6e-8, over the whole update
        error = float(np.linalg.norm(dense(module) - expected.numpy()) / expected.norm())
        assert error < 1e-6


def test_scaled_intruders_draw_in_a_bank_as_they_do_merged(base: Base) -> None:
    targets = ("to_q", "ff.net.2", "conv1")
    scaled = scale_intruders(base.components, {"arm": random_adapter(base, targets, 4, 0.2)})["arm"]
    arm = Arm(name="arm", rank=14, alpha=28, lr=1e-3, seed=0)
    bank = AdapterBank(base.components, resolve_targets(base.unet, targets), [arm])
    bank.load(0, scaled)
    draw = torch.Generator().manual_seed(1)
    inputs = (
        torch.randn(2, 4, 8, 8, generator=draw),
        torch.tensor(500),
        torch.randn(2, 77, 32, generator=draw),
    )
    with torch.inference_mode():
        plain = base.unet(*inputs).sample
        bank.attach().select([Slice(0)])
        beside = base.unet(*inputs).sample
        bank.detach()
        with merged_into(base, scaled):
            merged = base.unet(*inputs).sample
    # fp32: 1.2e-7 * sqrt(300) products summed in another order, through 12 layers, with a large update
    torch.testing.assert_close(beside, merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(beside, plain, atol=1e-2)


@pytest.mark.parametrize("function", [measure_adapters, scale_intruders])
def test_what_cannot_be_measured_is_refused_with_its_layer(function: object, base: Base) -> None:
    assert callable(function)
    module = random_adapter(base, ("to_q",), 2, 0.1).modules[Q]

    def refused(module: LoraModule, path: str = Q) -> str:
        with pytest.raises(AdapterError) as caught:
            function(base.components, {"arm": Adapter({path: module}, "bank", {})})
        return str(caught.value)

    assert refused(replace(module, dora_scale=torch.ones(16, 1))).startswith(f"{Q}: its module is DoRA")
    broken = replace(module, up=module.up.clone().fill_(float("nan")))
    assert refused(broken) == (
        f"{Q}: up has values that are NaN or infinite: take an earlier epoch's adapter"
    )
    other = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    assert refused(module, other) == (
        f"{other}: the adapter is for a weight of 16 x 16, the base's is 16 x 64: another base model"
    )
    for path in ("unet.down_blocks.9.conv", "text_encoder_2.layer", "unet.down_blocks.0"):
        assert refused(module, path).startswith(f"{path}: the base has no Linear or convolution of this name")
