"""What an adapter is in memory, whatever file it came from.

Modules are named by their path in diffusers' models, the component in front:
`unet.down_blocks.0.attentions.0.proj_in`, `text_encoder.text_model.encoder.layers.0.mlp.fc1`. Text-encoder
paths keep `text_model.`, as all files do, though transformers 5 dropped it from the names of live modules.
"""

import math
from dataclasses import dataclass, replace

from lorascope.adapters.modules import KIND_NAMES, FullModule, LoraModule, Module, ModuleKind
from lorascope.adapters.schedule import RankSchedule
from lorascope.base.layers import stable_diffusion_layers, stable_diffusion_norms
from lorascope.errors import AdapterError


@dataclass(frozen=True)
class Adapter:
    """An adapter, whatever file it came from."""

    modules: dict[str, Module]  # by path, see the head of this file
    # what the file was: "kohya", "peft", "diffusers", "diffusers lora.down/up", or several joined by " + "
    layout: str
    metadata: dict[str, str]  # of the safetensors header
    leftover: tuple[str, ...] = ()  # keys that belong to no module
    faults: tuple[str, ...] = ()  # what is wrong with it, a sentence each; `load_adapter` raises the first
    notes: tuple[str, ...] = ()  # what else of it a user should know, a sentence each
    schedule: RankSchedule | None = None  # of T-LoRA: how many components act at a timestep

    def at_strength(self, strength: float) -> "Adapter":
        """The adapter that does at weight 1 what this does at `strength`, by alpha where it has one.

        Raises `AdapterError` for DoRA, whose update is no multiple of alpha.
        """
        if any(module.dora_scale is not None for module in self.modules.values()):
            raise AdapterError(
                "DoRA: its update does not grow with alpha, so alpha holds no strength: leave it at 1 and "
                "give the weight to the program that draws"
            )
        modules = {path: module.at_strength(strength) for path, module in self.modules.items()}
        return replace(self, modules=modules)

    @property
    def kinds(self) -> tuple[ModuleKind, ...]:
        """The kinds of its modules, the first module's first."""
        return tuple(dict.fromkeys(module.kind for module in self.modules.values()))

    def lora_modules(self, remedy: str) -> dict[str, LoraModule]:
        """The modules, where all are LoRA; raises `AdapterError` where one is not, and `remedy` says what to
        do.
        """
        modules = {path: item for path, item in self.modules.items() if isinstance(item, LoraModule)}
        if len(modules) < len(self.modules):
            path, other = next(item for item in self.modules.items() if item[0] not in modules)
            raise AdapterError(f"{path}: is {KIND_NAMES[other.kind]}, not a product of two factors: {remedy}")
        return modules

    def require_unscheduled(self, remedy: str) -> None:
        """Raise `AdapterError` for T-LoRA, which has no single update; `remedy` says what to do."""
        if self.schedule is not None:
            raise AdapterError(
                f"T-LoRA: {self.schedule.min_rank} to {self.schedule.rank} components act by timestep, so no "
                f"single weight holds it: {remedy}"
            )

    def as_lora(self) -> "Adapter":
        """The same weights as LoRA of the full rank: of T-LoRA that is what programs make of it that do not
        know it.
        """
        if self.schedule is None:
            return self
        note = "T-LoRA written as LoRA: all components act at every timestep, as they did not in training"
        return replace(self, schedule=None, notes=(*self.notes, note))

    def components(self) -> dict[str, dict[str, Module]]:
        """The modules of `unet` and `text_encoder`, by path within the component; a component without modules
        is left out.
        """
        parts: dict[str, dict[str, Module]] = {}
        for path, module in self.modules.items():
            component, _, rest = path.partition(".")
            parts.setdefault(component, {})[rest] = module
        return parts


def misfits(adapter: Adapter) -> list[str]:
    """The paths of modules that Stable Diffusion v1.5 does not have, or has in another shape."""
    shapes = {**stable_diffusion_layers(), **stable_diffusion_norms()}
    return [
        path
        for path, module in adapter.modules.items()
        if (shape := shapes.get(path)) is None or not module.fits(shape)
    ]


def weight_shape(path: str, module: Module) -> tuple[int, ...]:
    """The shape of the weight that a module is for: (out, in), (out, in, kh, kw), or (out,) of a norm.

    Where its tensors do not show the kernel, it is that of Stable Diffusion v1.5's layer of this path.
    """
    if isinstance(module, FullModule):
        return tuple(module.weight.shape)
    (rows, columns), kernel = module.matrix_shape, module.kernel
    if kernel is None:
        kernel = stable_diffusion_layers().get(path, ())[2:]
    num_numbers = math.prod(kernel)
    return (rows, columns // num_numbers, *kernel) if columns % num_numbers == 0 else (rows, columns)
