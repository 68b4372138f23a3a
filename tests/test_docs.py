"""README.md, CONTRIBUTING.md and docs/: the Python runs, the tables are what the committed JSON gives, the commands,
recipes, keys, files and links exist.

A Python block runs unless `<!-- not run: WHY -->` stands before it; then it is compiled.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import minillm
import minillm_kernels
from minillm import cli
from minillm.config import schema
from minillm.config.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCK = re.compile(r"(<!-- not run: .*? -->\n)?^( *)```(\w+)\n(.*?)^\2```$", flags=re.M | re.S)


def blocks(language: str) -> list:
    """(page, whether it runs, text) of each fenced block."""
    return [
        pytest.param(
            page, not skipped, re.sub(rf"(?m)^{indent}", "", code), id=f"{page}:{text[:at].count(chr(10)) + 1}"
        )
        for page, text in PAGES.items()
        for at, skipped, indent, found, code in ((m.start(), *m.groups()) for m in BLOCK.finditer(text))
        if found == language
    ]


def commands() -> list:
    """(page, arguments) of each `minillm …` line of code, fenced or indented, also behind a launcher."""
    return [
        pytest.param(page, shlex.split(line, comments=True), id=f"{page}: minillm {line}")
        for page, text in PAGES.items()
        for line in re.findall(r"(?m)^(?: {4})?(?:\w.*(?:&& |-m ))?minillm ([a-z]+.*)$", text)
    ]


@pytest.fixture(scope="module")
def generator():
    """docs/generate.py, as mkdocs loads it."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def known_keys(generator) -> set[str]:
    found = set()
    for root in generator.roots(schema):
        for key in generator.keys_of(root):
            section = generator.keys_of(key.kind) if generator.is_section(key) else []
            found |= {key.name, *(f"{key.name}.{inner.name}" for inner in section)}
    return found


def test_tables_come_from_the_committed_json():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize(("page", "runs", "code"), blocks("python"))
def test_python_runs(page, runs, code):
    compiled = compile(code, page, "exec")
    if runs:
        exec(compiled, {})


@pytest.mark.parametrize(("page", "runs", "text"), blocks("yaml"))
def test_recipes_load(page, runs, text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert load_recipe(path).stages
    if "smoke:" in text:
        load_recipe(path, smoke=True)


@pytest.mark.parametrize(("page", "arguments"), commands())
def test_commands_parse(page, arguments, generator):
    options, overrides = cli._parser().parse_known_args(arguments)
    assert callable(options.run)
    known = known_keys(generator)
    for override in overrides:
        name = re.sub(r"^stages\.[\w-]+\.", "", override.partition("=")[0].removeprefix("--"))
        assert name in known, override


def test_commands_it_names_exist(capsys):
    for name in {name for text in PAGES.values() for name in re.findall(r"`minillm ([a-z]+)[^`]*`", text)}:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0, name


def test_keys_it_names_exist(generator):
    known = known_keys(generator)
    sections = {name.partition(".")[0] for name in known if "." in name}
    for page, text in PAGES.items():
        for name in re.findall(r"`([a-z]+\.\w+)(?:: [^`]+)?`", text):
            assert name in known or name.partition(".")[0] not in sections, (page, name)


def test_every_key_is_documented(generator):
    page = generator.on_page_markdown(PAGES["docs/configuration.md"])
    for root in generator.roots(schema):
        for key in generator.keys_of(root):
            inner = list(generator.keys_of(key.kind)) if generator.is_section(key) else [key]
            assert all(each.text or dataclasses.is_dataclass(each.kind) for each in inner), (key.name, inner)
    assert all(f"`{name}`" in page for name in known_keys(generator))


def test_every_kernel_is_named():
    page = PAGES["docs/kernels.md"]
    functions = {name for name in minillm_kernels.__all__ if inspect.isfunction(getattr(minillm_kernels, name))}
    assert not [name for name in functions if f"`{name}`" not in page]
    named = {name for text in PAGES.values() for name in re.findall(r"`(fused_\w+|Fused\w+)`", text)}
    assert named <= set(minillm_kernels.__all__)


@pytest.mark.parametrize("package", [minillm, minillm_kernels], ids=lambda package: package.__name__)
def test_examples_are_sections_of_their_own(package):
    """griffe reads `Examples:`; below `Example:` it sees prose, and the page a quotation."""
    for name in getattr(package, "__all__", ()):
        assert not re.search(r"(?m)^ *Example:$", getattr(package, name).__doc__ or ""), name


def test_files_it_names_exist():
    folders = "csrc|minillm|minillm_kernels|recipes|benchmarks|examples|tests|docs"
    for page, text in PAGES.items():
        for path in re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)`", text):
            assert (ROOT / path).exists(), (page, path)


def test_links_resolve():
    """To pages and their headings; mkdocs checks the pages of the site, this also README.md and CONTRIBUTING.md."""
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", re.sub(r"(?s)```.*?```", "", text)):
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), (page, target)
