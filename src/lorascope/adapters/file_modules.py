"""The keys of an adapter file as modules of any kind and spelling, from names and shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorascope.base.layers import Shape

# How a file may spell the two factors of a module: the ends of their keys, A (down) before B (up).
KOHYA = (".lora_down.weight", ".lora_up.weight")
PROCESSOR = ("_lora.down.weight", "_lora.up.weight")  # diffusers before 0.25
PEFT = (".lora_A.weight", ".lora_B.weight")
DIFFUSERS = (".lora.down.weight", ".lora.up.weight")
PEFT_BARE = (".lora_A", ".lora_B")
PEFT_DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
TRANSFORMERS = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
SPELLINGS = (KOHYA, PROCESSOR, PEFT, DIFFUSERS, PEFT_BARE, PEFT_DEFAULT, TRANSFORMERS)
_DORA = (".dora_scale", ".lora_magnitude_vector.weight", ".lora_magnitude_vector")
# Adapters other than LoRA: without one of these sets of keys there is none.
_OTHER_KINDS: dict[str, list[tuple[str, ...]]] = {
    "LoHa": [(".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")],
    "LoKr": [
        (first, second) for first in (".lokr_w1", ".lokr_w1_a") for second in (".lokr_w2", ".lokr_w2_a")
    ],
    "OFT": [(".oft_blocks",), (".oft_diag",)],
    "GLoRA": [(".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight")],
    "IA3": [(".on_input",)],
    "full difference": [(".diff",)],
    "norm difference": [(".w_norm",)],
}
_ENDINGS = sorted(
    {
        *(ending for pair in SPELLINGS for ending in pair),
        *(ending for sets in _OTHER_KINDS.values() for keys in sets for ending in keys),
        *_DORA,
        *(
            ".alpha",
            ".lora_mid.weight",
            ".hada_t1",
            ".hada_t2",
            ".lokr_w1_b",
            ".lokr_w2_b",
            ".lokr_t2",
            ".diff_b",
            ".b_norm",
            ".rescale",
        ),
    },
    key=len,
    reverse=True,
)


@dataclass
class FileModule:
    """The keys of one adapted layer, under the name that the file gives it."""

    name: str
    parts: dict[str, Shape] = field(default_factory=dict)  # by the end of the key

    @property
    def spelling(self) -> tuple[str, str] | None:
        """The ends of the keys of a LoRA's factors, if both are there."""
        return next((pair for pair in SPELLINGS if pair[0] in self.parts and pair[1] in self.parts), None)

    @property
    def kind(self) -> str | None:
        """`LoRA`, `LoHa`, `LoKr`, ..., or None where the parts make no whole adapter."""
        if self.spelling:
            return "LoRA"
        return next(
            (
                kind
                for kind, sets in _OTHER_KINDS.items()
                if any(all(key in self.parts for key in keys) for keys in sets)
            ),
            None,
        )

    @property
    def is_dora(self) -> bool:
        """Whether the update is normalised by a trained magnitude."""
        return any(ending in self.parts for ending in _DORA)

    @property
    def factors(self) -> tuple[Shape, Shape] | None:
        """Shapes of A and B of a LoRA."""
        return (self.parts[self.spelling[0]], self.parts[self.spelling[1]]) if self.spelling else None

    def fits(self, layer: Shape, strict: bool) -> bool:
        """Whether a LoRA's factors belong to a layer's weight. `strict`: their shapes must be the layer's
        own, not only of its size.

        Other kinds than LoRA always pass: their programs rebuild the shape.
        """
        if self.factors is None:
            return True
        down, up = self.factors
        if len(down) < 2 or len(up) < 2 or down[0] == 0:
            return False
        if strict:
            return down == (down[0], *layer[1:]) and up == (layer[0], down[0], *(1 for _ in layer[2:]))
        inside = num_elements(down[1:]) * (
            num_elements(self.parts[".lora_mid.weight"][2:]) if ".lora_mid.weight" in self.parts else 1
        )
        return inside == num_elements(layer[1:]) and up[0] == layer[0] and num_elements(up[1:]) == down[0]


def num_elements(shape: Shape) -> int:
    """The product of the extents: 1 for a shape without dimensions."""
    product = 1
    for extent in shape:
        product *= extent
    return product


def file_modules(shapes: Mapping[str, Shape]) -> tuple[dict[str, FileModule], tuple[str, ...]]:
    """The modules of an adapter file by their names in it, and the keys that belong to none."""
    modules: dict[str, FileModule] = {}
    leftover = []
    for key, shape in shapes.items():
        ending = next(
            (ending for ending in _ENDINGS if key.endswith(ending) and len(key) > len(ending)), None
        )
        if ending is None and key.endswith(".weight") and key.removesuffix("weight") + "on_input" in shapes:
            ending = ".weight"
        if ending is None:
            leftover.append(key)
            continue
        name = key.removesuffix(ending)
        modules.setdefault(name, FileModule(name)).parts[ending] = shape
    return modules, tuple(leftover)
