"""ARCHITECTURE.md holds: the order of imports, what stays free of torch, and the habits a machine can
check.
"""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lorascope.errors
from lorascope.errors import LorascopeError

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lorascope"
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")
ENTRY_POINTS = ("__init__", "__main__")

SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
MODULES = [name for name in SOURCES if name.rpartition(".")[2] not in ENTRY_POINTS]
# The tables of ARCHITECTURE.md: wings by floor, and modules with what they say about torch, in order.
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
FLOORS = {
    wing: int(floor)
    for floor, wings in re.findall(r"^\| (\d+) \| ([^|]+) \|", TEXT, re.MULTILINE)
    for wing in re.findall(r"`(\w+)/?`", wings)
}
TABLE = re.findall(r"^\| `([\w.]+)` \|.*\| ([^|]+) \|$", TEXT, re.MULTILINE)
ORDER = [name for name, _ in TABLE]


def wing(module: str) -> str:
    """The folder a module lives in, or the module itself where it has none."""
    return module.split(".")[0]


def imported(tree: ast.AST) -> set[str]:
    """The full names of all modules imported anywhere in a tree, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def own_modules(tree: ast.AST) -> set[str]:
    """The modules of this package that a tree imports."""
    names = {name.removeprefix("lorascope.") for name in imported(tree) if name.startswith("lorascope.")}
    return {name for name in names if name in SOURCES}


def public(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes."""
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )


def test_the_tables_list_every_wing_and_module_once() -> None:
    assert len(ORDER) == len(set(ORDER)) > 10
    assert set(MODULES) == set(ORDER)
    assert set(FLOORS) == {wing(module) for module in MODULES}


def defined(name: str) -> bool:
    """Whether `name` is a module, or something a module defines, such as `study.Study.run`."""
    if name in SOURCES:
        return True
    module = max((part for part in SOURCES if name.startswith(f"{part}.")), key=len, default=None)
    if module is None:
        return False
    body: list[ast.stmt] = TREES[module].body
    for part in name.removeprefix(f"{module}.").split("."):
        nodes = [node for node in body if getattr(node, "name", None) == part]
        if not nodes:
            return False
        body = getattr(nodes[0], "body", [])
    return True


def test_every_place_the_map_sends_a_reader_to_exists() -> None:
    start = TEXT.split("## Where to start reading")[1].split("\n## ")[0]
    names = re.findall(rf"`((?:{'|'.join(FLOORS)})\.[\w.]+)`", start)
    assert len(names) > 10
    assert [name for name in names if not defined(name)] == []
    assert not defined("study.Study.fly")
    assert not defined("data.nothing")


def wrong_imports(module: str, imports: set[str]) -> set[str]:
    """What a module may not import: anything but a lower floor, or what stands before it in its own wing.

    The ground floor counts as one wing.
    """

    def room(name: str) -> str | int:
        return 1 if FLOORS[wing(name)] == 1 else wing(name)

    def is_allowed(name: str) -> bool:
        if room(name) == room(module):
            return ORDER.index(name) < ORDER.index(module)
        return FLOORS[wing(name)] < FLOORS[wing(module)]

    return {name for name in imports & set(ORDER) if not is_allowed(name)}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_wing_or_a_lower_floor(module: str) -> None:
    assert wrong_imports(module, own_modules(TREES[module])) == set()


def test_the_rule_of_imports_can_fail() -> None:
    """A line upwards, one to a wing on the same floor, and one against the order within a wing."""
    assert wrong_imports("data.dataset", {"evaluation.prompts", "adapters.bank", "data.check", "store"}) == {
        "evaluation.prompts",
        "adapters.bank",
        "data.check",
    }
    assert wrong_imports("training.stage", {"diagnosis.weights", "report.page"}) == {
        "diagnosis.weights",
        "report.page",
    }
    seen = {"training.stage", "evaluation.scores", "report.page"}
    assert wrong_imports("diagnosis.weights", seen) == {"report.page"}
    assert wrong_imports("report.page", {"diagnosis.layers", "study"}) == {"study"}


def test_modules_without_torch_stay_so_in_all_they_import() -> None:
    light = [name for name, torch in TABLE if torch.strip() == "no" and name in MODULES]
    assert len(light) > 30
    result = python(f"""
import importlib, sys
for module in {light}:
    importlib.import_module("lorascope." + module)
    if loaded := [name for name in {HEAVY} if name in sys.modules]:
        sys.exit(f"{{module}} imports {{loaded}}")
""")
    assert (result.returncode, result.stderr) == (0, "")


def test_the_help_imports_no_torch() -> None:
    code = f"""
import sys
from lorascope.cli.app import main
code = main(["--help"])
loaded = [name for name in {(*HEAVY, "fastapi", "uvicorn", "sqlite3")} if name in sys.modules]
print(loaded, code, file=sys.stderr)
"""
    result = python(code)
    assert result.stderr.splitlines()[-1] == "[] 0"
    assert "study" in result.stdout


@pytest.mark.figures
def test_the_help_is_there_in_a_second() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        python('from lorascope.cli.app import main; main(["--help"])')
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_has_a_name_that_says_nothing(path: Path) -> None:
    assert not {path.stem, *path.parent.relative_to(PACKAGE).parts} & {
        "utils",
        "util",
        "helpers",
        "common",
        "misc",
        "core",
        "shared",
    }


@pytest.mark.parametrize("module", SOURCES)
def test_everything_public_has_a_docstring(module: str) -> None:
    assert ast.get_docstring(TREES[module])
    assert [node.name for node in public(TREES[module]) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("module", SOURCES)
def test_lines_fit_the_page(module: str) -> None:
    """110 columns, not counting what is said to the type checker."""
    lines = [re.sub(r"  # type: ignore.*", "", line) for line in SOURCES[module].splitlines()]
    assert [number for number, line in enumerate(lines, 1) if len(line) > 110] == []


def errors_raised(tree: ast.AST) -> set[str]:
    """The names of our user errors that a tree raises."""
    ours = {
        name
        for name, value in vars(lorascope.errors).items()
        if isinstance(value, type) and issubclass(value, LorascopeError)
    }
    calls = [
        node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    ]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)} & ours


# The command line turns errors into exit codes, which its tests look at instead.
RAISED = [
    (module, error)
    for module in MODULES
    if wing(module) != "cli"
    for error in sorted(errors_raised(TREES[module]))
]


@pytest.fixture(scope="module")
def tests() -> list[tuple[str, set[str]]]:
    """Every file of tests, with the modules of this package that it imports."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    return [(text, own_modules(ast.parse(text))) for text in texts]


@pytest.mark.parametrize(("module", "error"), RAISED)
def test_every_kind_of_error_a_module_raises_is_expected_by_a_test_of_it(
    module: str, error: str, tests: list[tuple[str, set[str]]]
) -> None:
    own = [text for text, modules in tests if module in modules]
    assert any(re.search(rf"raises\(\(?{error}\b", text) for text in own)
