"""Metadata of adapter files: those of the field, declared for what the adapter is."""

import datetime
import json

import torch

from lorascope.adapters.adapter import Adapter
from lorascope.adapters.metadata import kohya_metadata, tag_frequency
from lorascope.adapters.modules import LoraModule
from lorascope.base.layers import stable_diffusion_layers
from random_adapters import random_full, random_loha, random_lokr, random_module, sd15_adapter

STARTED = datetime.datetime(2026, 5, 4, 3, 2, 1, tzinfo=datetime.UTC)


def test_the_metadata_are_those_of_the_field() -> None:
    training = {"ss_tag_frequency": {"set": {"red": 2}}, "ss_learning_rate": 1e-4, "ss_min_snr_gamma": None}
    metadata = kohya_metadata(
        sd15_adapter(),
        "paper-r2",
        training,
        started=STARTED,
        resolution_px=512,
        prediction_type="v_prediction",
    )
    assert metadata == {
        "ss_output_name": "paper-r2",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "4.0",
        "ss_network_args": "{}",
        "ss_resolution": "(512, 512)",
        "ss_tag_frequency": '{"set": {"red": 2}}',
        "ss_learning_rate": "0.0001",
        "ss_min_snr_gamma": "None",
        "ss_training_started_at": "1777863721.0",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "paper-r2",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "v",
        "modelspec.date": "2026-05-04T03:02:01+00:00",
    }


def test_convolutions_cores_and_other_models_are_declared() -> None:
    generator = torch.Generator().manual_seed(0)
    conv = random_module((320, 320, 3, 3), 3, 1.5, generator)
    path = "unet.down_blocks.0.resnets.0.conv1"
    own = kohya_metadata(Adapter({**sd15_adapter().modules, path: conv}, "kohya", {}), "a")
    assert own["ss_network_dim"] == own["ss_network_alpha"] == "Dynamic"
    assert json.loads(own["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "1.5"}
    core = LoraModule(conv.down[:, :, :1, :1], conv.up, 1.5, mid=torch.ones(3, 3, 3, 3))
    tucker = kohya_metadata(Adapter({path: core}, "kohya", {}), "a")
    assert (
        tucker["ss_network_module"] == "lycoris.kohya"
        and json.loads(tucker["ss_network_args"])["use_tucker"] == "True"
    )
    small = kohya_metadata(Adapter({path: random_module((8, 8, 3, 3), 3, 1.5, generator)}, "kohya", {}), "a")
    assert small["ss_base_model_version"] == "other" and small["modelspec.architecture"] == "other/lora"


def test_lycoris_kinds_are_declared() -> None:
    """Rank and alpha of those that have one."""
    generator = torch.Generator().manual_seed(0)
    path, conv = "unet.mid_block.attentions.0.proj_in", "unet.down_blocks.0.resnets.0.conv1"
    shape, wide = stable_diffusion_layers()[path], stable_diffusion_layers()[conv]
    loha = {
        path: random_loha(shape, 2, 1.0, generator),
        conv: random_loha(wide, 2, 1.0, generator, core=True),
    }
    own = kohya_metadata(Adapter({**loha}, "kohya", {}), "a")
    assert (own["ss_network_module"], own["ss_network_dim"], own["ss_network_alpha"]) == (
        "lycoris.kohya",
        "2",
        "1.0",
    )
    assert json.loads(own["ss_network_args"]) == {
        "conv_dim": "2",
        "conv_alpha": "1",
        "algo": "loha",
        "use_tucker": "True",
    }
    assert own["ss_base_model_version"] == "sd_v1"
    lokr = kohya_metadata(Adapter({conv: random_lokr(wide, 2, 1.0, generator)}, "kohya", {}), "a")
    assert json.loads(lokr["ss_network_args"])["algo"] == "lokr" and lokr["ss_base_model_version"] == "sd_v1"
    norm = "unet.down_blocks.0.resnets.0.norm1"
    full = {path: random_full(shape, generator), norm: random_full((320,), generator)}
    own = kohya_metadata(Adapter({**full}, "kohya", {}), "a")
    assert json.loads(own["ss_network_args"])["algo"] == "full" and own["ss_network_dim"] == "Dynamic"
    assert own["ss_base_model_version"] == "sd_v1"
    full[norm] = random_full((321,), generator)
    assert kohya_metadata(Adapter({**full}, "kohya", {}), "a")["ss_base_model_version"] == "other"


def test_tags_are_counted_by_frequency_and_name() -> None:
    assert list(tag_frequency(["red, house", "house,", "blue , red"]).items()) == [
        ("house", 2),
        ("red", 2),
        ("blue", 1),
    ]
    assert len(tag_frequency([f"caption {index}" for index in range(5000)])) == 1000
