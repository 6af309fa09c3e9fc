"""Systems without what only POSIX has: no such modules, no /proc. `test_wheel` runs a study on one."""

import ast
from pathlib import Path

import pytest

from without_posix import POSIX_ONLY, run_without_posix

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lorascope"
POSIX_CALLS = {"fork", "getuid", "geteuid", "mkfifo", "sysconf", "uname", "killpg", "setsid", "nice", "chown"}
MODULES = sorted(
    ".".join(("lorascope", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)


def test_what_is_hidden_is_hidden(tmp_path: Path) -> None:
    code = "import importlib, pathlib\n"
    for statement in ("import fcntl", "importlib.import_module('resource')"):
        code += f"try: exec({statement!r}, {{'__name__': 'lorascope.x', 'importlib': importlib}})\n"
        code += "except ImportError: print('refused')\n"
    code += "print(pathlib.Path('/proc/meminfo').exists())"
    done = run_without_posix(tmp_path, ROOT / "src", code)
    assert done.stdout.split() == ["refused", "refused", "False"], done.stderr


def test_every_module_is_imported_without_what_only_posix_has(
    tmp_path: Path,
) -> None:
    done = run_without_posix(
        tmp_path,
        ROOT / "src",
        f"import importlib\nfor name in {MODULES!r}: importlib.import_module(name)\nprint('all')",
    )
    assert done.stdout.strip() == "all", done.stderr[-2000:]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_or_calls_what_only_posix_has(module: str) -> None:
    path = PACKAGE / Path(*module.split(".")[1:])
    source = (
        path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    ).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & POSIX_ONLY
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in POSIX_ONLY
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in POSIX_CALLS
