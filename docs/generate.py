"""For mkdocs: makes the configuration page from the dataclasses in minillm/config/schema.py and their fields' texts.

`<!-- configuration -->` becomes one table per dataclass that is no section of another one, followed by one table per
section. Classes, sections and keys are found, none is named here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple, get_type_hints

from minillm.config import schema

MARK = "<!-- configuration -->"


class Key(NamedTuple):
    """One field of a dataclass."""

    name: str
    kind: Any
    default: str
    text: str
    """The string below the field."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, configuration(schema)) if MARK in markdown else markdown


def configuration(module: ModuleType) -> str:
    parts = []
    for root in roots(module):
        keys = list(keys_of(root))
        parts += [f"## {root.__name__}", doc_of(root), table("", [key for key in keys if not is_section(key)])]
        for section in filter(is_section, keys):
            # one name may stand in two roots, and an anchor must be unique
            anchor = f"{root.__name__.lower()}-{section.name}"
            parts += [f"### `{section.name}` {{ #{anchor} }}", section.text, doc_of(section.kind)]
            parts += [table(f"{section.name}.", list(keys_of(section.kind)))]
    return "\n\n".join(part for part in parts if part)


def roots(module: ModuleType) -> list[type]:
    """The dataclasses of the module that are no section of another one, in the order of the file."""
    found = [c for c in vars(module).values() if dataclasses.is_dataclass(c) and c.__module__ == module.__name__]
    sections = {key.kind for c in found for key in keys_of(c)}
    return [c for c in found if c not in sections]


def keys_of(cls: type) -> Iterator[Key]:
    hints = get_type_hints(cls)
    body = definition(cls).body
    texts = {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else ""
        yield Key(field.name, hints[field.name], value(default), texts.get(field.name, ""))


def doc_of(cls: type) -> str:
    """Its own docstring, without the one that dataclasses make up."""
    return ast.get_docstring(definition(cls)) or ""


def definition(cls: type) -> ast.ClassDef:
    (found,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(found, ast.ClassDef)
    return found


def is_section(key: Key) -> bool:
    return dataclasses.is_dataclass(key.kind)


def table(prefix: str, keys: list[Key]) -> str:
    if not keys:
        return ""
    rows = [f"| `{prefix}{k.name}` | {kind(k.kind)} | {k.default} | {cell(k.text)} |" for k in keys]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def kind(hint: Any) -> str:
    return cell(hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint))


def value(default: Any) -> str:
    """As one would write it in YAML."""
    if default == "" or dataclasses.is_dataclass(default):
        return ""
    if isinstance(default, bool) or default is None:
        return {True: "`true`", False: "`false`", None: "`null`"}[default]
    return f"`{list(default) if isinstance(default, tuple) else default}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|")
