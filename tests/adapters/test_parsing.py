"""The tensors of strangers' files: what makes up an adapter is read, what is wrong is named."""

from pathlib import Path

import pytest
import torch

from adapter_files import KOHYA_ATTENTION, Tensors, kohya, pair, without, write
from lorascope.adapters.files import load_adapter, save_adapter
from lorascope.adapters.parsing import parse_adapter
from lorascope.errors import AdapterError
from random_adapters import ATTENTION


@pytest.mark.parametrize(
    "alpha", [torch.tensor(3), torch.tensor([3]), torch.tensor([3.0]), torch.tensor(3).to(torch.uint8)]
)
def test_an_alpha_of_any_number_is_read(tmp_path: Path, alpha: torch.Tensor) -> None:
    (module,) = load_adapter(write(tmp_path / "a.safetensors", kohya(alpha=alpha))).modules.values()
    assert module.alpha == 3.0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(kohya(), "lora_up.weight"), r"has down without up: the file is incomplete"),
        (without(kohya(alpha=torch.tensor(1.0)), "lora_down.weight"), r"has alpha, up without down"),
        (
            {**kohya(), f"{KOHYA_ATTENTION}_to_q.lora_up.weight": torch.ones(6, 5)},
            r"down \[2, 6\] and up \[6, 5\] do not fit together",
        ),
        ({**kohya(), f"{KOHYA_ATTENTION}_to_q.lora_up.weight": torch.ones(6)}, r"up is \[6\]: expected"),
        ({**kohya(), f"{KOHYA_ATTENTION}_to_q.lora_down.weight": torch.ones(0, 6)}, r"down is \[0, 6\]"),
        (
            {**kohya(), f"{KOHYA_ATTENTION}_to_q.lora_mid.weight": torch.ones(4, 4)},
            r"the core lora_mid is \[4, 4\] and down \[2, 6\]: expected \[r, r, kh, kw\]",
        ),
        (
            kohya(dora_scale=torch.ones(7)),
            r"dora_scale is \[7\]: expected one number for each of 6 outputs or 6 inputs",
        ),
        (
            {key: tensor.to(torch.int8) for key, tensor in kohya().items()},
            r"down holds int8, not floating-point weights",
        ),
        (kohya(alpha=torch.ones(2)), r"alpha must be one finite number, is of shape \[2\]"),
        (
            {**kohya(), **kohya(f"{KOHYA_ATTENTION}_to_out"), **kohya(f"{KOHYA_ATTENTION}_to_out_0")},
            r"two modules of one name: '.*to_out",
        ),
        (
            {
                **kohya(),
                **pair(f"unet.{ATTENTION}.to_q.lora_A.weight", f"unet.{ATTENTION}.to_q.lora_B.weight"),
            },
            rf"two modules of one name: .* are both unet.{ATTENTION}.to_q \(and 1 more\)",
        ),
        (
            kohya("lora_unet_down_blocks_0_nowhere"),
            r"none of its 2 keys names a module, the first is 'lora_unet_down_blocks_0_nowhere",
        ),
        (
            pair("unet.../../etc.lora_A.weight", "unet.../../etc.lora_B.weight"),
            r"none of its 2 keys names a module",
        ),
    ],
)
def test_faults_are_named(tmp_path: Path, tensors: Tensors, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        load_adapter(write(tmp_path / "a.safetensors", tensors))


def test_parsing_never_raises_and_keeps_what_it_can() -> None:
    """For `inspect`: half a pair and unknown keys are left over, the rest is read."""
    tensors = {
        **kohya(),
        **without(kohya(f"{KOHYA_ATTENTION}_to_k"), "lora_up.weight"),
        "weird": torch.ones(1),
    }
    adapter = parse_adapter(tensors, {})
    assert list(adapter.modules) == [f"unet.{ATTENTION}.to_q"] and len(adapter.faults) == 1
    assert adapter.leftover == (f"{KOHYA_ATTENTION}_to_k.lora_down.weight", "weird")


def test_leftover_keys_are_told(tmp_path: Path) -> None:
    adapter = load_adapter(
        write(
            tmp_path / "a.safetensors",
            {**kohya(), "lora_unet_up_blocks_9_odd.lora_down.weight": torch.ones(1, 1)},
        )
    )
    written = save_adapter(adapter, tmp_path / "b.safetensors", "kohya", "fp32")
    assert (
        "1 keys belong to no module and are left out, the first is "
        "'lora_unet_up_blocks_9_odd.lora_down.weight'" in written.notes
    )
