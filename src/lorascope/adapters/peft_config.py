"""PEFT's configuration of an adapter: where it stands, what it says of alpha and rank, and what ours says."""

import collections
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorascope.adapters.names import is_plain_path, parse_key
from lorascope.errors import AdapterError, first_line
from lorascope.store import PEFT_ALPHA, PEFT_CONFIG, PEFT_RANK, PEFT_WEIGHTS, read_regular

if TYPE_CHECKING:
    from lorascope.adapters.modules import LoraModule, Module, ModuleKind

PEFT_TYPES: dict["ModuleKind", str] = {"lora": "LORA", "loha": "LOHA", "lokr": "LOKR"}
_LARGEST = 3.4028234e38  # of float32
_CONFIG_LIMIT = 10_000_000  # bytes of an adapter_config.json


def read_peft_config(weights: Path) -> dict[str, Any] | None:
    """PEFT's configuration beside its weights; None for a file that is no part of a PEFT folder."""
    path = weights.with_name(PEFT_CONFIG)
    if weights.name != PEFT_WEIGHTS or not path.exists():
        return None
    try:
        config = json.loads(read_regular(path, AdapterError, _CONFIG_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path}: cannot be read ({first_line(error)}): without it alpha is unknown"
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: must be a JSON object, is a {type(config).__name__}")
    return config


def peft_configs(
    metadata: Mapping[str, str], peft_config: Mapping[str, Any] | None, faults: list[str]
) -> dict[str, dict[str, Any]]:
    """PEFT's configuration by component, from a folder's file or from the header; a damaged one is a
    fault.
    """
    if peft_config is not None:
        configs = {component: dict(peft_config) for component in ("unet", "text_encoder")}
    else:
        text = metadata.get("lora_adapter_metadata")
        try:
            packed = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            packed = None
        if not isinstance(packed, dict):
            faults.append(
                "lora_adapter_metadata is not a JSON object, so alpha is unknown: save the adapter again"
            )
            packed = {}
        configs = {}
        for key, value in packed.items():
            for prefix, component in (
                ("unet.", "unet"),
                ("text_encoder.", "text_encoder"),
                ("base_model.model.", "unet"),
            ):
                if key.startswith(prefix):
                    configs.setdefault(component, {})[key.removeprefix(prefix)] = value
    return {component: config for component, config in configs.items() if _is_usable(config, faults)}


def _is_usable(config: Mapping[str, Any], faults: list[str]) -> bool:
    """Whether a PEFT configuration says what its tensors mean; adds a fault where it does not."""
    kind, init = config.get("peft_type", "LORA"), config.get("init_lora_weights", True)
    pattern, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}
    alpha = _alpha_key(config)
    if kind not in PEFT_TYPES.values():
        faults.append(f"peft_type = {repr(kind)[:80]}: only LORA, LOHA and LOKR can be converted")
    elif isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        # These subtract the adapter's first state from the base, so the file means something only on that
        # changed base.
        faults.append(
            f"init_lora_weights = {init[:80]!r} changes the base's weights: "
            "save it again with PEFT's path_initial_model_for_weight_conversion"
        )
    elif not isinstance(pattern, dict) or any(_literal(name) is None for name in pattern):
        faults.append(
            "alpha_pattern must map plain module names to numbers: regular expressions are not read"
        )
    elif not isinstance(ranks, dict):
        faults.append(f"rank_pattern is {repr(ranks)[:80]}: must map module names to numbers")
    elif not all(map(_is_finite_number, (config.get(alpha, 0), *pattern.values()))):
        faults.append(
            f"{alpha} = {repr(config.get(alpha))[:80]} or a value of alpha_pattern is not a finite number"
        )
    else:
        return True
    return False


def _alpha_key(config: Mapping[str, Any]) -> str:
    return "lora_alpha" if config.get("peft_type", "LORA") == "LORA" else "alpha"


def _is_finite_number(value: object) -> bool:
    """Whether it is a number that float32 holds, in which every program multiplies."""
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def alpha_of(config: Mapping[str, Any] | None, path: str, rank: int) -> float | None:
    """alpha of a module under a PEFT configuration, in terms of scale = alpha / rank."""
    if not config:
        return None
    alpha = _stated_alpha(config, path)
    return alpha * (math.sqrt(rank) if config.get("use_rslora") and _alpha_key(config) != "alpha" else 1.0)


def stated_scale(config: Mapping[str, Any] | None, path: str) -> float:
    """alpha / r of a module as a PEFT configuration states both, 1 where it does not."""
    if not config or not _is_rank(rank := _stated_rank(config, path, PEFT_RANK)):
        return 1.0
    return _stated_alpha(config, path) / float(rank)


def _stated_alpha(config: Mapping[str, Any], path: str) -> float:
    default = config.get(_alpha_key(config), PEFT_ALPHA)
    return float(_by_pattern(config.get("alpha_pattern") or {}, path, default))


def _stated_rank(config: Mapping[str, Any], path: str, default: int) -> Any:
    return _by_pattern(config.get("rank_pattern") or {}, path, config.get("r", default))


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's own rule: the value of the first pattern that is the path, or its end after a dot."""
    named = ((_literal(key), value) for key, value in patterns.items())
    return next((value for name, value in named if name and _ends_with(path, name)), default)


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _literal(pattern: str) -> str | None:
    """The module name that a pattern of PEFT means; None for a real regular expression, which is not run on a
    stranger's word.
    """
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return name if is_plain_path(name) else None


def rank_faults(modules: Mapping[str, "Module"], configs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Kinds and ranks that a PEFT configuration states and the tensors do not have, which PEFT refuses too:
    the scale alpha / rank would be a guess.
    """
    for path, module in modules.items():
        component, _, name = path.partition(".")
        config = configs.get(component)
        if config is None:
            continue
        kind = config.get("peft_type", "LORA")
        if kind != PEFT_TYPES.get(module.kind):
            yield (
                f"{path}: its configuration states peft_type {kind}, its tensors are "
                f"{PEFT_TYPES.get(module.kind, 'a full difference')}: put the configuration there that "
                "belongs to the file"
            )
            continue
        rank = _stated_rank(config, name, module.rank)
        if module.has_scale and rank != module.rank:
            yield (
                f"{path}: its configuration states rank {repr(rank)[:80]}, its tensors have rank "
                f"{module.rank}: correct r or rank_pattern"
            )
        elif not module.has_scale and not _is_rank(rank):
            yield f"{path}: its configuration states rank {repr(rank)[:80]}, must be a whole number above 0"


def configuration_notes(
    keys: Iterable[str], metadata: Mapping[str, str], peft_config: Mapping[str, Any] | None
) -> list[str]:
    """What a PEFT configuration promises that a file with these keys does not hold, a sentence each."""
    paths, magnitudes, biases = set(), False, False
    for key in keys:
        if named := parse_key(key):
            paths.add(named.path)
            magnitudes |= named.field == "dora_scale"
        biases |= key.endswith(".bias")
    notes = []
    for component, config in peft_configs(metadata, peft_config, []).items():
        own = [path.partition(".")[2] for path in paths if path.startswith(f"{component}.")]
        if not own:
            continue
        if config.get("use_dora") and not magnitudes:
            notes.append(
                "use_dora is set but there are no magnitudes: it is taken for plain LoRA, "
                "and PEFT takes the base's own"
            )
        if config.get("bias") not in (None, "none") and not biases:
            notes.append(
                f"bias = {repr(config['bias'])[:80]} but there are no biases: those trained with it are lost"
            )
        for key in ("rank_pattern", "alpha_pattern"):
            names = [name for name in map(_literal, config.get(key) or {}) if name is not None]
            if lost := [name for name in names if not any(_ends_with(path, name) for path in own)]:
                notes.append(
                    f"{key} names {len(lost)} modules that the file does not have, such as {lost[0][:200]}"
                )
    return notes


def peft_options(modules: Mapping[str, "LoraModule"]) -> dict[str, Any]:
    """PEFT's configuration of one component's modules: the commonest rank and alpha, and patterns for the
    others.
    """
    # Without `text_model.` the names are ends of the live names of every transformers version; PEFT matches
    # ends.
    named = {path.removeprefix("text_model."): module for path, module in modules.items()}
    rank, rank_pattern = _patterns({path: module.rank for path, module in named.items()})
    alpha, alpha_pattern = _patterns({path: module.effective_alpha for path, module in named.items()})
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(named),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(module.dora_scale is not None for module in named.values()),
        "init_lora_weights": True,
    }


def lycoris_options(
    kind: "ModuleKind", ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """What PEFT's configurations of LoHa and LoKr have in common, from the rank and alpha of each module."""
    names = {path: path.removeprefix("text_model.") for path in ranks}  # as of `peft_options`
    rank, rank_pattern = _patterns({names[path]: value for path, value in ranks.items()})
    alpha, alpha_pattern = _patterns({names[path]: value for path, value in alphas.items()})
    return {
        "peft_type": PEFT_TYPES[kind],
        "r": rank,
        "alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(names.values()),
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "init_weights": True,
    }


def kronecker_factors(size: int, factor: int) -> tuple[int, int]:
    """The two factors in which LyCORIS and PEFT split a side of a weight for LoKr under a `decompose_factor`.

    A factor that divides the side is the first of the two; else the first is the side's largest divisor that
    is at most its square root, and at most `factor` unless that is -1.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else max(1, min(math.isqrt(size), factor))
    first = next(number for number in range(most, 0, -1) if size % number == 0)
    return first, size // first


def _patterns(values: Mapping[str, float]) -> tuple[int | float, dict[str, int | float]]:
    """The commonest value, and those of the paths that have another."""
    commonest = collections.Counter(values.values()).most_common(1)[0][0]
    others = {path: _number(value) for path, value in values.items() if value != commonest}
    return _number(commonest), others


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def adapter_metadata(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """diffusers' `lora_adapter_metadata` of a file, empty where there is none or it cannot be parsed."""
    try:
        content = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
