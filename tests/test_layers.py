"""Imports go one way, in the order of the data: a newcomer can read the files from top to bottom of this list."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

from cxr_vae.config import OPTIONS

ROOT = Path(__file__).parents[1]

LAYERS = [
    ["errors"],
    ["config", "files", "console", "workers", "allocator", "locks", "heartbeat"],
    ["config_file"],
    ["distributed", "noise", "precision", "stopping"],
    ["phantoms"],
    ["data"],
    ["inspection"],
    ["losses"],
    ["models"],
    ["pictures", "checkpoints"],
    ["run_dir"],
    ["weights"],
    ["priors"],
    ["sampling"],
    ["training"],
    ["evaluation"],
    ["audit"],
    ["report"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
"""Modules and packages; inside a package nothing is imported in a circle."""

LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

MAX_LINES, USUAL_LINES = 400, 150
MAX_FUNCTION, USUAL_FUNCTION = 50, 35
MAX_LOOP = 60


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names a module imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_of(path: Path) -> str:
    """The layer's name of a module: a package counts as one."""
    return path.relative_to(ROOT / "cxr_vae").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules("cxr_vae"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    name = name_of(path)
    if name == "__init__":
        assert not any(imported.startswith("cxr_vae") for imported in imports(path))
        return
    assert name in LAYER, f"{name} has no place in the order: put it into LAYERS"
    for imported in imports(path):
        parts = imported.split(".")
        if parts[0] == "cxr_vae" and len(parts) > 1 and parts[1] in LAYER and parts[1] != name:
            allowed = LAYER[parts[1]] <= LAYER[name]
            assert allowed, f"{name} imports {parts[1]}, which comes after it"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("package", ["cxr_vae", "launch"])
def test_nothing_is_imported_in_a_circle(package: str) -> None:
    names = {module_of(path) for path in modules(package)}
    needs = {
        module_of(path): {
            module
            for imported in imports(path)
            for module in (imported, imported.rpartition(".")[0])
            if module in names - {module_of(path)}
        }
        for path in modules(package)
    }
    assert list(TopologicalSorter(needs).static_order())  # CycleError names the circle


def test_only_the_launcher_knows_submitit_and_slurm() -> None:
    for path in modules("cxr_vae"):
        assert not any(name.split(".")[0] in ("submitit", "launch") for name in imports(path)), path
        assert "SLURM" not in path.read_text(), path


def lines_of_functions(path: Path) -> dict[str, int]:
    """Lines of each function and method, by its name."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions)]
    return {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in found}


def test_files_and_functions_are_none_to_scroll_through() -> None:
    paths = modules("cxr_vae") + modules("launch")
    lines = {path: len(path.read_text().splitlines()) for path in paths}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}
    assert median(lines.values()) <= USUAL_LINES
    functions = {(path.name, name): count for path in paths for name, count in lines_of_functions(path).items()}
    assert {name: count for name, count in functions.items() if count > MAX_FUNCTION} == {}
    assert sum(count > USUAL_FUNCTION for count in functions.values()) <= len(functions) / 10


def test_the_training_loop_is_read_in_one_screen() -> None:
    assert lines_of_functions(ROOT / "cxr_vae/training/loop.py")["loop"] <= MAX_LOOP
    assert len((ROOT / "cxr_vae/training/train.py").read_text().splitlines()) <= 200


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_read_somewhere(option: str) -> None:
    sources = [path.read_text() for path in modules("cxr_vae") + modules("launch") if path.parent.name != "config"]
    name = option.rpartition(".")[2]
    assert any(re.search(rf"[.\"]{name}\b", text) for text in sources)
