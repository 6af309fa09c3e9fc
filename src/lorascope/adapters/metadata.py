"""The metadata of adapter files: what WebUI, Forge and ComfyUI show of one."""

import datetime
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lorascope.adapters.adapter import Adapter, misfits, weight_shape
from lorascope.adapters.modules import FullModule

# the commonest ones: a caption that is a sentence is a tag of its own, and all of them would be megabytes
_MAX_TAGS = 1000


def kohya_metadata(
    adapter: Adapter,
    name: str,
    training: Mapping[str, Any] | None = None,
    *,
    started: datetime.datetime | None = None,
    resolution_px: int = 512,
    prediction_type: str = "epsilon",
) -> dict[str, str]:
    """The metadata of a kohya file, all strings: what WebUI, Forge and ComfyUI read, in the words of
    sd-scripts and ModelSpec 1.0.0.

    `name` becomes `ss_output_name`, the alias in WebUI's prompts: keep it unique. `training` are further
    `ss_` keys, of which mappings are written as JSON and None as "None"; `started` is the time training
    began. An adapter whose layers are not Stable Diffusion v1.5's is not declared as such. The hashes are
    added by `save_adapter`.
    """
    fits = not misfits(adapter)
    ranked = [module for module in adapter.modules.values() if not isinstance(module, FullModule)]
    dims = {module.rank for module in ranked}
    alphas = {module.effective_alpha for module in ranked}
    facts: dict[str, Any] = {
        "ss_output_name": name,
        "ss_v2": False,
        "ss_base_model_version": "sd_v1" if fits else "other",
        **_network(adapter),
        "ss_network_dim": dims.pop() if len(dims) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
        "ss_resolution": f"({resolution_px}, {resolution_px})",
        **(training or {}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora" if fits else "other/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution_px}x{resolution_px}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
    }
    if started is not None:
        facts["ss_training_started_at"] = started.timestamp()
        facts["modelspec.date"] = started.astimezone(datetime.UTC).isoformat(timespec="seconds")
    return {
        key: json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)
        for key, value in facts.items()
    }


def _network(adapter: Adapter) -> dict[str, Any]:
    """Which of its readers' network kinds an adapter is, with that kind's arguments."""
    modules = adapter.modules.values()
    kernels = [
        module
        for path, module in adapter.modules.items()
        if math.prod(weight_shape(path, module)[2:]) > 1 and not isinstance(module, FullModule)
    ]
    has_core = any(not {"mid", "t1", "t2"}.isdisjoint(module.tensors()) for module in modules)
    is_dora = any(module.dora_scale is not None for module in modules)
    others = [kind for kind in adapter.kinds if kind != "lora"]
    arguments: dict[str, str] = {}
    if kernels:
        arguments |= {"conv_dim": str(kernels[0].rank), "conv_alpha": f"{kernels[0].effective_alpha:g}"}
    if others:
        arguments |= {"algo": others[0], "use_tucker": str(has_core)}
    elif has_core or is_dora:
        arguments |= {"algo": "locon", "use_tucker": str(has_core), "dora_wd": str(is_dora)}
    return {
        "ss_network_module": "lycoris.kohya" if others or has_core or is_dora else "networks.lora",
        "ss_network_args": arguments,
    }


def tag_frequency(captions: Sequence[str]) -> dict[str, int]:
    """How often each comma-separated tag stands in the captions: the commonest thousand, those of one count
    by name.
    """
    counts = Counter(
        tag for caption in captions for tag in (part.strip() for part in caption.split(",")) if tag
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_TAGS])
