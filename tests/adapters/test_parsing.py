"""The tensors of strangers' files: what makes up an adapter is read, what is wrong is named."""

from pathlib import Path

import pytest
import torch

from adapter_files import KOHYA_ATTENTION, Tensors, kohya, pair, peft_pairs, without, write
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
            {
                **kohya(),
                f"{KOHYA_ATTENTION}_to_q.lora_mid.weight": torch.ones(3, 2, 1, 1),
                f"{KOHYA_ATTENTION}_to_q.lora_up.weight": torch.ones(6, 3),
            },
            r"down \[2, 6\] and up \[6, 3\] with a core \[3, 2, 1, 1\] do not fit together",
        ),
        (
            kohya(dora_scale=torch.ones(2, 3)),
            r"dora_scale is \[2, 3\]: expected one number for each of 6 outputs or 6 inputs",
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


def test_magnitudes_are_those_of_outputs_or_inputs_by_spelling_and_shape() -> None:
    """[1, n] of a square layer: inputs in LyCORIS' files, outputs in PEFT's."""
    ours = f"{KOHYA_ATTENTION}_to_q.dora_scale"
    for shape, expected in (((6,), (6, 1)), ((6, 1), (6, 1)), ((1, 6), (1, 6)), ((1, 6, 1, 1), (1, 6))):
        (module,) = parse_adapter({**kohya(), ours: torch.ones(shape)}, {}).modules.values()
        assert module.dora_scale is not None and module.dora_scale.shape == expected
    peft = peft_pairs()
    name = f"base_model.model.{ATTENTION}.to_q.lora_magnitude_vector"
    for shape in ((6,), (1, 6), (1, 6, 1, 1)):
        module = parse_adapter({**peft, name: torch.ones(shape)}, {}).modules[f"unet.{ATTENTION}.to_q"]
        assert module.dora_scale is not None and module.dora_scale.shape == (6, 1)


def test_a_core_between_two_matrices_is_multiplied_in() -> None:
    core = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    tensors = {**kohya(), f"{KOHYA_ATTENTION}_to_q.lora_mid.weight": core[..., None, None]}
    (module,) = parse_adapter(tensors, {}).modules.values()
    assert module.mid is None
    torch.testing.assert_close(module.down, core @ tensors[f"{KOHYA_ATTENTION}_to_q.lora_down.weight"])


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
