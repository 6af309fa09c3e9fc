"""lorascope trains LoRA candidates under equal conditions and shows with evidence which one to keep.

The names below are imported at first use, so that `import lorascope` is quick and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorascope.adapters.bank import AdapterBank
    from lorascope.adapters.files import load_adapter
    from lorascope.adapters.inspection import inspect_adapter
    from lorascope.base.loading import load_base
    from lorascope.config import load_study
    from lorascope.study import Study

__version__ = "0.1.0"
__all__ = ["AdapterBank", "Study", "inspect_adapter", "load_adapter", "load_base", "load_study"]

_MODULES = {
    "AdapterBank": "adapters.bank",
    "Study": "study",
    "inspect_adapter": "adapters.inspection",
    "load_adapter": "adapters.files",
    "load_base": "base.loading",
    "load_study": "config",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'lorascope' has no attribute {name!r}")
    return getattr(import_module(f"lorascope.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
