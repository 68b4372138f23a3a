"""The tree: imports go down only and never in a circle, the lower rooms know nothing of what stands on them, and no
file is long. Imports inside functions count; those for type checkers do not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {  # a module may import from its own room and from the rooms to its left
    "minillm": "files foreign lost terminal config data model parallel engine teacher run evaluation train report "
    "doctor distillation __init__ study teach cli __main__",
    "minillm_kernels": "_core rows arguments backends parallel logits hidden __init__",
}


def modules(package: str) -> dict[str, Path]:
    """Dotted names and files, those of the compiled core's stub included."""
    files = sorted((ROOT / package).rglob("*.py")) + sorted((ROOT / package).rglob("*.pyi"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(file: Path) -> Iterator[str]:
    """The dotted names that a file imports."""

    def nodes(parent: ast.AST) -> Iterator[ast.AST]:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                node.body = []
            yield node
            yield from nodes(node)

    package = file.relative_to(ROOT).parent.parts
    for node in nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            yield from (".".join(filter(None, (*above, node.module, alias.name))) for alias in node.names)


def imported_modules(package: str) -> dict[str, set[str]]:
    """For each module of a package the others of it that it imports."""
    known = modules(package)

    def module(name: str) -> str:
        return name if name in known else module(name.rpartition(".")[0])

    return {
        importer: {module(name) for name in imports(file) if name.partition(".")[0] == package} - {importer}
        for importer, file in known.items()
    }


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


@pytest.mark.parametrize("package", ROOMS)
def test_imports_go_down_only(package):
    order = {name: floor for floor, name in enumerate(ROOMS[package].split())}
    graph = imported_modules(package)
    assert sorted({room(module) for module in graph} - set(order)) == [], "say above where these rooms stand"
    up = [f"{a} imports {b}" for a, bs in graph.items() for b in sorted(bs) if order[room(a)] < order[room(b)]]
    assert up == []


@pytest.mark.parametrize("package", ROOMS)
def test_imports_make_no_circle(package):
    TopologicalSorter(imported_modules(package)).prepare()  # a CycleError shows the circle


def test_the_kernels_know_neither_transformers_nor_the_trainer():
    foreign = {"transformers", "minillm"}
    found = [f"{m} imports {name}" for m, file in modules("minillm_kernels").items() for name in imports(file)
             if name.partition(".")[0] in foreign]  # fmt: skip
    assert found == []


def test_only_the_bindings_know_python():
    sources = [file for file in (ROOT / "csrc").rglob("*.*") if file.relative_to(ROOT).parts[1] != "python"]
    assert {file.parent.name for file in sources} >= {"rowmath", "cpu", "cuda"}
    header = re.compile(r'#\s*include\s*[<"](Python\.h|pybind11|torch|ATen|c10)\b')
    assert [str(file) for file in sources if header.search(file.read_text())] == []


def test_the_training_loop_calls_the_kernels_by_their_public_names():
    loop = ROOT / "minillm" / "train" / "loop.py"
    assert [name for name in imports(loop) if name.partition(".")[0] == "triton"] == []
    assert "torch.ops" not in loop.read_text()


def test_no_file_is_above_400_lines():
    files = {file: len(file.read_text().splitlines()) for package in ROOMS for file in modules(package).values()}
    assert {str(file.relative_to(ROOT)): lines for file, lines in files.items() if lines > 400} == {}
