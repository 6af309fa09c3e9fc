"""Files made to do harm: whatever stands in header, weights and metadata, only a `LorascopeError` of one line
comes out.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorascope.adapters.export import convert
from lorascope.adapters.files import load_adapter
from lorascope.adapters.inspection import inspect_adapter
from lorascope.adapters.inspection_text import as_text
from lorascope.adapters.lowrank import Checkpoint, Target, extract, resize
from lorascope.adapters.merge import merge_weights
from lorascope.base.configs import read_configs
from lorascope.base.loading import Base, load_base
from lorascope.base.saving import save_ldm
from lorascope.errors import LorascopeError
from lorascope.sections import BaseSection
from lorascope.store import PEFT_CONFIG, PEFT_WEIGHTS

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = "lora_unet_" + Q.replace(".", "_")
DEEP = "[" * 5000  # deeper than the parser goes
PLAIN = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NUMBERS = st.sampled_from([0, -1, 4, 10**400, 1e308, float("nan"), float("inf"), 0.5, True, None])
TEXTS = st.sampled_from(["", "a\nb", "\x1b[2J", "unet.r", "LORA", "(a+)+$", "^x$", "pissa", "x" * 2000, Q])
VALUES = st.recursive(
    NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
PEFT_KEYS = (
    "peft_type",
    "r",
    "lora_alpha",
    "alpha_pattern",
    "rank_pattern",
    "target_modules",
    "use_rslora",
    "init_lora_weights",
    "use_dora",
)
CONFIGS = st.fixed_dictionaries({}, optional=dict.fromkeys(PEFT_KEYS, VALUES))
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.bool,
    torch.complex64,
    torch.uint16,
    torch.float64,
]


def outcome(action: Callable[[], object]) -> None:
    """Run something that may only succeed or raise a user error of one line that a terminal can show."""
    message = ""
    try:
        action()
    except LorascopeError as error:
        message = str(error)
    assert message.isprintable() and len(message) < 1500, repr(message)


def look(path: Path) -> None:
    inspection = inspect_adapter(path)
    json.dumps(inspection.as_dict())
    assert as_text(inspection, list_modules=True).replace("\n", "").isprintable()


def all_of(path: Path, folder: Path) -> None:
    outcome(lambda: load_adapter(path))
    outcome(lambda: look(path))
    for layout in ("kohya", "diffusers", "peft"):
        outcome(lambda layout=layout: convert(path, folder / f"out-{layout}.safetensors", layout, force=True))
    outcome(lambda: resize(load_adapter(path), Target(rank=1)))
    outcome(lambda: merge_weights({f"unet.{Q}.weight": torch.ones(320, 320)}, load_adapter(path)))


def tensor_of(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> torch.Tensor:
    return torch.ones(draw(st.sampled_from(shapes))).to(draw(st.sampled_from(DTYPES)))


WHOLE = (  # endings that together make an adapter, in the first of their shapes
    (),
    (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"),
    (".lokr_w1", ".lokr_w2_a", ".lokr_w2_b"),
    (".diff", ".diff_b"),
)


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Keys and shapes near those of an adapter."""
    downs, ups = [(2, 320), (2, 320, 1, 1), (2, 0), (), (2,)], [(320, 2), (320, 2, 1, 1), (320, 2, 3, 3), ()]
    names: dict[str, list[tuple[int, ...]]] = {
        **dict.fromkeys((".lora_down.weight", ".lora_A.weight", ".lora.down.weight"), downs),
        **dict.fromkeys((".lora_up.weight", ".lora_B.weight", ".lora.up.weight"), ups),
        ".alpha": [(), (1,), (2,), (0,)],
        ".lora_mid.weight": [(2, 2, 3, 3), (2, 2), (2, 2, 3), (3, 2, 1, 1), ()],
        ".dora_scale": [(320, 1), (1, 320), (7,), (), (0,), (1, 320, 1, 1)],
        **{f".hada_w{n}_a": [(320, 2), (320, 2), (2, 320), (2, 2), ()] for n in (1, 2)},
        **{f".hada_w{n}_b": [(2, 320), (2, 320), (3, 320), (0, 2)] for n in (1, 2)},
        **{f".{name}": [(2, 2, 3, 3), (2, 2), (2, 3, 1, 1)] for name in ("hada_t1", "hada_t2", "lokr_t2")},
        **{f".lokr_w{n}": [(16, 16), (20, 20), (20, 20, 1, 1), (20, 20, 2), ()] for n in (1, 2)},
        ".lokr_w2_a": [(20, 2), (2, 20)],
        ".lokr_w2_b": [(2, 20), (1, 20)],
        **{f".{name}": [(320, 320), (320,), (320, 320, 1, 1), (0,), ()] for name in ("diff", "w_norm")},
        **{f".{name}": [(320,), (7,), (320, 1)] for name in ("diff_b", "b_norm")},
    }
    modules = draw(
        st.lists(
            st.sampled_from(
                [FLAT, f"unet.{Q}", f"base_model.model.{Q}", "lora_unet_conv_in", "a\nb", "lora_te_x"]
            ),
            max_size=2,
        )
    )
    tensors = {}
    for module in modules:
        for ending in draw(st.lists(st.sampled_from(list(names)), max_size=5)):
            tensors[module + ending] = tensor_of(draw, names[ending])
        for ending in draw(st.sampled_from(WHOLE)):
            tensors[module + ending] = torch.ones(names[ending][0])
        if draw(st.booleans()):
            down, up = (
                (".lora_down.weight", ".lora_up.weight")
                if module.startswith("lora_")
                else (".lora_A.weight", ".lora_B.weight")
            )
            tensors |= {module + down: torch.ones(2, 320), module + up: torch.ones(320, 2)}
    return tensors


METADATA = st.fixed_dictionaries(
    {},
    optional={
        "lora_adapter_metadata": CONFIGS.map(lambda c: json.dumps({f"unet.{k}": v for k, v in c.items()}))
        | VALUES.map(json.dumps)
        | st.just(DEEP),
        "ss_network_args": VALUES.map(json.dumps) | st.just(DEEP),
        "ss_tag_frequency": VALUES.map(json.dumps) | st.just('{"a": {"b": Infinity}}') | st.just(DEEP),
        "ss_output_name": TEXTS,
        "ss_training_started_at": NUMBERS.map(str),
        "modelspec.title": TEXTS,
        "sshs_model_hash": TEXTS,
    },
)


@settings(PLAIN, max_examples=150)
@given(tensors=adapters(), metadata=METADATA, config=st.none() | CONFIGS | VALUES)
def test_adapters_with_any_tensors_and_metadata(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], config: Any
) -> None:
    safetensors.torch.save_file(tensors, path := tmp_path / PEFT_WEIGHTS, metadata)
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config))
    all_of(path, tmp_path / "file")
    all_of(tmp_path, tmp_path / "folder")


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@settings(PLAIN, max_examples=40)
@given(
    entry=st.fixed_dictionaries({}, optional=dict.fromkeys(ENTRY, VALUES)),
    name=TEXTS | st.just(f"{FLAT}.lora_down.weight"),
    cut=st.integers(0, 40),
    flip=st.integers(0, 80),
    length=st.integers(-3, 3) | st.just(2**62),
)
def test_damaged_headers(
    tmp_path: Path, entry: dict[str, Any], name: str, cut: int, flip: int, length: int
) -> None:
    text = json.dumps({name: {**ENTRY, **entry}}).encode()
    content = bytearray(struct.pack("<Q", (len(text) + length) % 2**64) + text + bytes(16))
    content[flip % len(content)] ^= flip
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content[: len(content) - cut])
    all_of(path, tmp_path)
    outcome(lambda: load_base(BaseSection(model=str(path)), torch.device("cpu")))


SOUND = {
    f"{FLAT}.lora_down.weight": torch.ones(2, 320),
    f"{FLAT}.lora_up.weight": torch.ones(320, 2),
    f"{FLAT}.alpha": torch.tensor(1.0),
    f"base_model.model.{Q}.lora_A.weight": torch.ones(2, 320),
}


@settings(PLAIN, max_examples=40)
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4))
def test_adapters_with_any_bytes_changed(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(safetensors.torch.save(SOUND, {"ss_network_dim": "2"}))
    end = 8 + int.from_bytes(content[:8], "little")
    for place, value in changes:
        content[place % (end + 16)] = value
    (path := tmp_path / "changed.safetensors").write_bytes(content)
    all_of(path, tmp_path)


@settings(PLAIN, max_examples=40)
@given(name=st.text(max_size=12), middle=st.sampled_from([FLAT, f"unet.{Q}", "lora_unet_", "text_encoder."]))
def test_adapters_with_any_names(tmp_path: Path, name: str, middle: str) -> None:
    endings = (".lora_down.weight", ".lora_A.weight", ".alpha", ".lora.up.weight", ".lora_up.weight")
    tensors = {
        f"{part}{ending}": torch.ones(2, 2) for part in (name + middle, middle + name) for ending in endings
    }
    try:
        safetensors.torch.save_file(tensors, path := tmp_path / "names.safetensors")
    except UnicodeEncodeError:
        return  # no file can have such a name
    all_of(path, tmp_path)


@pytest.fixture
def checkpoint(base: Base, tmp_path: Path) -> Path:
    save_ldm(base, path := tmp_path / "sound.safetensors", torch.float16)
    return path


CONFIG_KEYS = {
    "unet/config.json": (
        "in_channels",
        "layers_per_block",
        "block_out_channels",
        "cross_attention_dim",
        "norm_num_groups",
        "_class_name",
    ),
    "vae/config.json": ("latent_channels", "block_out_channels", "layers_per_block", "down_block_types"),
    "text_encoder/config.json": (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ),
    "scheduler/scheduler_config.json": (
        "num_train_timesteps",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "beta_start",
    ),
    "tokenizer/tokenizer_config.json": ("model_max_length", "tokenizer_class", "auto_map"),
}
LARGE = st.sampled_from([10**7, 10**15, [2, 2, 2], "a\nb"])


@settings(PLAIN, max_examples=40)
@given(
    changes=st.lists(
        st.sampled_from([(file, key) for file, keys in CONFIG_KEYS.items() for key in keys]),
        min_size=1,
        max_size=2,
    ),
    values=st.lists(VALUES | LARGE, min_size=2, max_size=2),
    whole=st.none() | VALUES.map(json.dumps) | st.just(DEEP),
)
def test_checkpoints_with_any_configuration(
    checkpoint: Path, tmp_path: Path, changes: list[tuple[str, str]], values: list[Any], whole: str | None
) -> None:
    content = checkpoint.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:end]), content[end:]
    files = json.loads(header["__metadata__"]["lorascope.configs"])
    for (file, key), value in zip(changes, values, strict=False):
        files[file] = json.dumps({**json.loads(files.get(file, "{}")), key: value})
    configs = json.dumps(files) if whole is None else whole
    text = json.dumps(
        {**header, "__metadata__": {**header["__metadata__"], "lorascope.configs": configs}}
    ).encode()
    path = tmp_path / "base.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    outcome(lambda: extract(Checkpoint(path), Checkpoint(checkpoint), Target(rank=1)))
    outcome(lambda: load_base(BaseSection(model=str(path)), torch.device("cpu")).encode_text(["a cat"]))


@settings(PLAIN, max_examples=25)
@given(
    change=st.sampled_from([(file, key) for file, keys in CONFIG_KEYS.items() for key in keys]),
    value=VALUES | LARGE | st.sampled_from([320_000, [320_000, 320_000], ["DownBlock2D"], 2, 33]),
    whole=st.none()
    | VALUES.map(json.dumps)
    | st.sampled_from([DEEP, "{", "\x00", '{"a": 1' + "0" * 5000 + "}"]),
)
def test_folders_with_any_configuration(
    pipeline_folder: Path, tmp_path: Path, change: tuple[str, str], value: Any, whole: str | None
) -> None:
    folder, (file, key) = tmp_path / "base", change
    shutil.copytree(pipeline_folder, folder, dirs_exist_ok=True)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, key: value}) if whole is None else whole)
    outcome(lambda: load_base(BaseSection(model=str(folder)), torch.device("cpu")).encode_text(["a cat"]))
    outcome(lambda: read_configs(BaseSection(model=str(folder))))
    outcome(lambda: extract(Checkpoint(folder), Checkpoint(pipeline_folder), Target(rank=1)))
