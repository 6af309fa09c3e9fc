"""Systems without what only POSIX has: no such modules, no /proc, paths in any script."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import make_pictures

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lorascope"
Run = Callable[..., subprocess.CompletedProcess[str]]
POSIX_ONLY = {
    "fcntl",
    "grp",
    "posix",
    "pty",
    "pwd",
    "resource",
    "syslog",
    "termios",
    "tty",
    "_posixsubprocess",
}
POSIX_CALLS = {"fork", "getuid", "geteuid", "mkfifo", "sysconf", "uname", "killpg", "setsid", "nice", "chown"}
MODULES = sorted(
    ".".join(("lorascope", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)

# Found by every Python process as `sitecustomize`, by passes side by side too. It refuses lorascope what
# other systems have not; libraries, which choose by `sys.platform`, keep theirs here.
WITHOUT_POSIX = f"""
import builtins, importlib, os, pathlib, sys

builtin_import, import_module = builtins.__import__, importlib.import_module

def is_refused(name, importer):
    return name in {sorted(POSIX_ONLY)!r} and str(importer).startswith("lorascope")

def refuse(name, globals=None, locals=None, fromlist=(), level=0):
    if is_refused(name, (globals or {{}}).get("__name__")):
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return builtin_import(name, globals, locals, fromlist, level)

def refuse_by_name(name, package=None):
    if is_refused(name, sys._getframe(1).f_globals.get("__name__")):
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return import_module(name, package)

def hide(method):
    def hidden(self, *args, **kwargs):
        if self.parts[1:2] in (("proc",), ("sys",)):
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return method(self, *args, **kwargs)
    return hidden

builtins.__import__, importlib.import_module = refuse, refuse_by_name
pathlib.Path.stat, pathlib.Path.open = hide(pathlib.Path.stat), hide(pathlib.Path.open)

import lorascope.store
lorascope.store._IS_POSIX = False
"""


@pytest.fixture(scope="module")
def without_posix(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs code without POSIX in a process of its own."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(WITHOUT_POSIX, encoding="utf-8")
    path = os.pathsep.join((str(folder), str(ROOT / "src")))

    def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=variables, encoding="utf-8"
        )

    return run


def test_what_is_hidden_is_hidden(without_posix: Run) -> None:
    code = "import importlib, pathlib\n"
    for statement in ("import fcntl", "importlib.import_module('resource')"):
        code += f"try: exec({statement!r}, {{'__name__': 'lorascope.x', 'importlib': importlib}})\n"
        code += "except ImportError: print('refused')\n"
    code += "print(pathlib.Path('/proc/meminfo').exists())"
    done = without_posix(code)
    assert done.stdout.split() == ["refused", "refused", "False"], done.stderr


def test_every_module_is_imported_without_what_only_posix_has(
    without_posix: Run,
) -> None:
    done = without_posix(
        f"import importlib\nfor name in {MODULES!r}: importlib.import_module(name)\nprint('all')"
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


def test_a_study_runs_without_posix_in_a_folder_with_spaces_and_letters_of_any_script(
    study_file: Path, tmp_path: Path, without_posix: Run
) -> None:
    """All stages, with two passes side by side, from pictures in such a folder too."""
    folder = tmp_path / "Meine Läufe – 実験 (1)"
    pictures = folder / "les œuvres & plus"
    pictures.mkdir(parents=True)
    for index, (content, caption) in enumerate(make_pictures(12)):
        (pictures / f"Bild {index} ñ.png").write_bytes(content)
        (pictures / f"Bild {index} ñ.txt").write_text(caption, encoding="utf-8")
    study = folder / "ma première étude.toml"
    study.write_text(study_file.read_text(encoding="utf-8"), encoding="utf-8")
    code = "import sys\nfrom lorascope.cli.app import main\nsys.exit(main(sys.argv[1:]))"
    command = ["study", str(study), "--run-dir", str(folder / "der Lauf")]
    for setting in (f"data.source={pictures}", "workers=2", "train.max_stacked_arms=1", "train.epochs=1"):
        command += ["--set", setting]
    done = without_posix(code, *command, XDG_CACHE_HOME=str(folder / "Zwischen speicher"))
    assert done.returncode == 0, done.stderr[-3000:]
    report = folder / "der Lauf" / "report.html"
    assert done.stdout.strip().endswith(f"Report: {report}") and report.exists()
