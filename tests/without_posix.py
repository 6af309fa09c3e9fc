"""Python processes without what only POSIX has: no such modules, no /proc, no /sys."""

import os
import subprocess
import sys
from pathlib import Path

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


def run_without_posix(
    folder: Path, path: Path, code: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code on such a system, lorascope being imported from `path`; `folder` holds the disguise."""
    (folder / "sitecustomize.py").write_text(WITHOUT_POSIX, encoding="utf-8")
    paths = os.pathsep.join((str(folder), str(path)))
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        encoding="utf-8",
    )
