"""Whatever stands in a weight file, every reader of ours either takes it or says in one line why not."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorascope.adapter_files import Adapter, LoraModule, load_adapter, save_adapter
from lorascope.base import load_base
from lorascope.config import BaseSection
from lorascope.errors import LorascopeError
from lorascope.export import convert, kohya_metadata
from lorascope.inspection import inspect_file
from lorascope.inspection_text import as_text

NUMBERS = [None, -1, 0, 1, 2**63, 2**70, 1e308, True, -0.5, "", "NaN", "F32", "F8_E4M3", [], {}, [0, -1], [2**62, 2**62], "a" * 5000]
TEXTS = [
    "",
    "{",
    "[]",
    "null",
    "1",
    '{"a": 1}',
    '{"unet.r": 1e400}',
    '{"unet.r": -1, "unet.lora_alpha": null}',
    '{"unet.rank_pattern": [1]}',
]
TEXTS += [
    '{"unet.alpha_pattern": {"(": 1}}',
    '{"unet/config.json": "{}"}',
    '{"unet/config.json": "{\\"block_out_channels\\": [1]}"}',
    "\x1b[31m",
]
NAMES = ["lora_adapter_metadata", "ss_network_args", "ss_tag_frequency", "ss_training_started_at", "ss_output_name", "lorascope.configs"]
SPECIAL = [b"\x00\x7c", b"\x00\x7e", b"\xff\xff", b"\x00\x00"]  # fp16: infinity, NaN twice, zero


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small kohya file with a Linear, a convolution and a module of the text encoder."""
    shapes = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": ((4, 320), (320, 4)),
        "unet.down_blocks.0.resnets.0.conv1": ((4, 320, 3, 3), (320, 4, 1, 1)),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": ((4, 768), (768, 4)),
    }
    modules = {path: LoraModule(torch.randn(down), torch.randn(up), 2.0) for path, (down, up) in shapes.items()}
    adapter = Adapter(modules, "peft", {}, ())
    path = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    save_adapter(adapter, path, "kohya", "fp16", kohya_metadata(adapter, "whole"))
    return path.read_bytes()


def mutate(whole: bytes, draw: random.Random) -> bytes:
    """The file with its bytes, header, names, metadata, values or tensors changed, or something else in its place."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8:end]), bytearray(whole[end:])
    names = [name for name in header if name != "__metadata__"]
    match draw.choice(["noise", "cut", "bytes", "entries", "names", "metadata", "values", "missing"]):
        case "noise":
            return draw.randbytes(draw.randrange(200))
        case "cut":
            return whole[: draw.randrange(len(whole))]
        case "bytes":
            changed = bytearray(whole)
            for _ in range(draw.randrange(1, 6)):
                changed[draw.randrange(end + 200)] = draw.randrange(256)
            return bytes(changed)
        case "entries":
            for _ in range(draw.randrange(1, 4)):
                header[draw.choice(names)][draw.choice(["dtype", "shape", "data_offsets"])] = draw.choice(NUMBERS)
        case "names":
            for name in draw.sample(names, 3):
                others = [
                    name.replace("down", "up"),
                    name.replace("unet", "te"),
                    name[:-3],
                    name.replace("_", "."),
                    "../../etc/passwd",
                    name + "\u202e",
                ]
                header[draw.choice(others)] = header.pop(name)
        case "metadata":
            header["__metadata__"] = draw.choice([*NUMBERS, {draw.choice(NAMES): draw.choice([*TEXTS, 1])}])
        case "values":
            for _ in range(50):
                place = draw.randrange(len(body) - 4) & ~1
                body[place : place + 2] = draw.choice(SPECIAL)
        case "missing":
            for name in draw.sample(names, draw.randrange(1, len(names))):
                del header[name]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


def is_taken_or_refused_in_one_line(read: Callable[[], Any]) -> bool:
    try:
        read()
    except LorascopeError as error:
        return len(str(error).splitlines()) == 1
    return True


@pytest.mark.parametrize("seed", range(60))
def test_a_changed_file_is_taken_or_refused_in_one_line(whole: bytes, seed: int, tmp_path: Path) -> None:
    draw, path = random.Random(seed), tmp_path / "changed.safetensors"
    path.write_bytes(mutate(whole, draw))
    before = set(tmp_path.iterdir())
    layout = draw.choice(["kohya", "diffusers", "peft"])
    assert is_taken_or_refused_in_one_line(lambda: load_adapter(path))
    assert is_taken_or_refused_in_one_line(lambda: as_text(inspect_file(path)))
    assert is_taken_or_refused_in_one_line(lambda: load_base(BaseSection(model=str(path)), torch.device("cpu")))
    assert is_taken_or_refused_in_one_line(lambda: convert(path, tmp_path / "out", layout))
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "out"}


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_peft_configuration_is_taken_or_refused_in_one_line(whole: bytes, seed: int, tmp_path: Path) -> None:
    (tmp_path / "whole.safetensors").write_bytes(whole)
    folder = convert(tmp_path / "whole.safetensors", tmp_path / "peft", "peft").path / "unet"
    draw, place = random.Random(seed), folder / "adapter_config.json"
    config = json.loads(place.read_text())
    for _ in range(draw.randrange(1, 3)):
        config[draw.choice([*config, "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"])] = draw.choice(
            [*NUMBERS, {"(": 1}, {"a*a*b": -1}]
        )
    place.write_text(draw.choice([json.dumps(config)] * 8 + TEXTS[:5]))
    assert is_taken_or_refused_in_one_line(lambda: load_adapter(folder))
    assert is_taken_or_refused_in_one_line(lambda: as_text(inspect_file(folder)))
