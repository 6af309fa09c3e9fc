"""Builds and loads `guard.cpp`. Imports no torch: torch asks once, early, whether there is CUDA."""

import ctypes
import importlib.util
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def _torch_root() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build(folder: Path) -> Path:
    """Compile; takes some seconds. Raises `FileNotFoundError` where there is no compiler."""
    root, library = _torch_root(), folder / "libpretended_cuda.so"
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    command = [
        "c++",
        "-O1",
        "-std=c++20",
        "-w",
        "-fPIC",
        "-shared",
        *includes,
        str(SOURCE),
        "-o",
        str(library),
    ]
    subprocess.run([*command, *libraries], check=True, capture_output=True, text=True)
    return library


def load(library: Path) -> None:
    """Load before torch is imported."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_root() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library)).install_guard()
