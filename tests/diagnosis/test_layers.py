"""Figures by layer: quantiles, blocks and the heat map, against numbers counted by hand."""

import json
from dataclasses import asdict

import pytest

from lorascope.base.layers import stable_diffusion_layers
from lorascope.diagnosis.layers import (
    BLOCKS,
    LayerFigures,
    Spread,
    block_of,
    by_block,
    heat_map,
    place_of,
    summarise,
)

DOWN = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
UP = "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.11.mlp.fc1"


def figures(layer: str, norm_ratio: float | None = 0.1, num_intruders: int = 0) -> LayerFigures:
    return LayerFigures(layer, 4, norm_ratio, 0.2, 1.5, 3, 10, num_intruders)


def test_an_arm_is_summed_up_by_quartiles_and_its_greatest_layer() -> None:
    arm = [figures(DOWN, 0.1, 2), figures(UP, 0.5), figures(TEXT, 0.2, 1), figures("unet.conv_in", 0.3)]
    summary = summarise(arm)
    assert summary.norm_ratio == Spread(
        pytest.approx(0.175), pytest.approx(0.25), pytest.approx(0.35), 0.5, UP
    )
    assert summary.stable_rank == Spread(1.5, 1.5, 1.5, 1.5, DOWN)
    assert (summary.num_layers, summary.num_intruders, summary.layers_with_intruders) == (4, 3, 2)
    assert summary.intruder_share == 3 / 40


def test_a_base_weight_of_zeros_has_no_ratio_and_leaves_the_others_theirs() -> None:
    summary = summarise([figures(DOWN, None), figures(UP, 0.5)])
    assert summary.norm_ratio == Spread(0.5, 0.5, 0.5, 0.5, UP)
    assert summarise([figures(DOWN, None)]).norm_ratio is None
    none_looked_at = LayerFigures(UP, 4, 0.1, 0.2, 1.5, 3, 0, 0)
    assert (none_looked_at.intruder_share, summarise([none_looked_at]).intruder_share) == (0.0, 0.0)


def test_figures_and_summaries_come_back_from_json() -> None:
    layer = figures(DOWN, None, 1)
    assert LayerFigures(**json.loads(json.dumps(asdict(layer), allow_nan=False))) == layer
    stored = json.loads(json.dumps(asdict(summarise([layer])), allow_nan=False))
    assert stored["rank_95"]["greatest_layer"] == DOWN and stored["norm_ratio"] is None


def test_nothing_cannot_be_summed_up() -> None:
    with pytest.raises(ValueError, match="no layers"):
        summarise([])


def test_blocks_are_summed_up_in_the_models_order_without_the_absent_ones() -> None:
    blocks = by_block([figures(UP, 0.5), figures(DOWN, 0.1), figures(TEXT), figures(UP, 0.3)])
    assert list(blocks) == ["text", "down", "up"]
    assert blocks["up"].num_layers == 2 and blocks["up"].norm_ratio is not None
    assert blocks["up"].norm_ratio.median == pytest.approx(0.4)


def test_every_layer_of_stable_diffusion_has_a_block_and_a_place_of_its_own() -> None:
    layers = list(stable_diffusion_layers())
    assert {block_of(layer) for layer in layers} == set(BLOCKS)
    assert [layer for layer in layers if block_of(layer) == "other"] == [
        "unet.conv_in",
        "unet.time_embedding.linear_1",
        "unet.time_embedding.linear_2",
        "unet.conv_out",
    ]
    assert len({place_of(layer) for layer in layers}) == len(layers)
    assert place_of(DOWN) == ("down 0.1", "attn1.to_q")
    assert place_of("unet.mid_block.attentions.0.proj_in") == ("mid 0", "proj_in")
    assert place_of("unet.up_blocks.1.upsamplers.0.conv") == ("up 1", "upsamplers.0.conv")
    assert place_of(TEXT) == place_of(TEXT.replace("text_model.", "")) == ("text 11", "mlp.fc1")
    assert place_of("unet.conv_in") == ("other", "conv_in")


def test_a_heat_map_has_rows_in_the_models_order_and_holes_where_no_layer_is() -> None:
    second = "text_encoder.text_model.encoder.layers.2.mlp.fc1"
    found = heat_map(
        [figures(UP, 0.5), figures(TEXT, 0.2), figures(DOWN, None), figures(second, 0.4)], "norm_ratio"
    )
    assert found.rows == ("text 2", "text 11", "down 0.1", "up 3.2")
    assert found.columns == ("attn1.to_q", "mlp.fc1")
    assert found.values == ((None, 0.4), (None, 0.2), (None, None), (0.5, None))
    assert heat_map([figures(UP, 0.5, 3)], "intruder_share").values == ((0.3,),)
    assert heat_map([figures(UP)], "rank_95").values == ((3.0,),)
