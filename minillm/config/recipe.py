"""Recipes: configs read from YAML, overridden by flags, checked before any work.

A *recipe* is a config with `stages:`, each a set of overrides run in order on the same student, and optionally
`smoke:`, overrides that make the whole recipe short. Precedence, lowest first: defaults, those of
`objective.variant`, recipe, its stage, its smoke overrides, flags (`--optim.lr=1e-5`, or for one stage
`--stages.minillm.optim.lr=1e-5`).
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from minillm.config.schema import VARIANTS, Config, ConfigError, Objective, check, one_of, unknown


@dataclass(frozen=True)
class Recipe:
    """Named stages of one run, in order; a plain config is a recipe of one stage."""

    name: str
    stages: dict[str, Config]

    @property
    def first(self) -> Config:
        return next(iter(self.stages.values()))

    def to_dict(self) -> dict[str, Any]:
        """Everything resolved, in the form that `load_recipe` reads."""
        return json.loads(json.dumps({"stages": {k: dataclasses.asdict(stage) for k, stage in self.stages.items()}}))

    def digest(self) -> str:
        """Hash of everything resolved but the output directory and logging: two runs with one digest ran the same."""
        tree = self.to_dict()
        for stage in tree["stages"].values():
            del stage["output"], stage["log"]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def load_recipe(path: str | Path, flags: Sequence[str] = (), smoke: bool = False) -> Recipe:
    """Read a YAML recipe or config, apply `--section.key=value` flags, check every stage.

    Raises ConfigError for anything unknown, mistyped or contradictory, FileNotFoundError for a missing file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}: give the path of a YAML file, such as recipes/smollm2-cpu.yaml")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; expected sections such as `model:` and `optim:`")
    layers = [tree]
    if smoke:
        if not isinstance(tree.get("smoke"), dict):
            raise ConfigError(f"{path} has no `smoke:` section, which --smoke would apply")
        layers.append(tree["smoke"])
    layers.append(parse_flags(flags))
    stage_names = list(tree.get("stages") or {tree.get("method", Config.method): {}})
    for layer in layers[1:]:
        for name in layer.get("stages") or {}:
            if name not in stage_names:
                raise ConfigError(unknown("stage", name, stage_names))
    stages = {}
    for name in stage_names:
        merged: dict[str, Any] = {}
        for layer in layers:
            merge(merged, {k: v for k, v in layer.items() if k not in ("stages", "smoke")})
            merge(merged, (layer.get("stages") or {}).get(name) or {})
        stages[name] = config_from(merged)
        check(stages[name])
    return Recipe(path.stem, stages)


def config_from(tree: Mapping[str, Any]) -> Config:
    """A Config from nested mappings; an unknown section or key, or a wrong type, is a ConfigError."""
    objective = tree.get("objective")
    if isinstance(objective, Mapping):
        variant = objective.get("variant", Objective.variant)
        one_of("objective.variant", variant, list(VARIANTS))
        tree = {**tree, "objective": {**VARIANTS[variant], **objective}}
    return _build(Config, tree, "")


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """`["--optim.lr=1e-5"]` → `{"optim": {"lr": "1e-5"}}`; values stay text until their field's type is known."""
    tree: dict[str, Any] = {}
    for flag in flags:
        name, equals, value = flag.partition("=")
        if not name.startswith("--") or not equals:
            raise ConfigError(f"cannot read {flag!r}; overrides are written --section.key=value")
        node = tree
        *parents, leaf = name[2:].split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lay `over` on `base`, section by section, in place."""
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def save(recipe: Recipe, path: Path) -> None:
    """Write everything resolved, so that the run can be read and repeated without its flags."""
    path.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))


def _build(cls: type, tree: Any, path: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"`{path}` is {tree!r}; it is a section: expected keys below it")
    kinds = get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in kinds:
            raise ConfigError(unknown(f"key in section `{path}`" if path else "section or key", str(key), list(kinds)))
        is_section = dataclasses.is_dataclass(kinds[key])
        values[key] = _build(kinds[key], value, where) if is_section else _coerce(value, kinds[key], where)
    return cls(**values)


def _coerce(value: Any, kind: Any, path: str) -> Any:
    """`value` as `kind`. Text is parsed: flags are text, and YAML 1.1 reads 1e-5 as text."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # T | None
        if value is None or value in ("none", "null"):
            return None
        return _coerce(value, args[0], path)
    parsed = yaml.safe_load(value) if isinstance(value, str) and kind is not str else value
    if origin is tuple:
        if isinstance(parsed, (list, tuple)) and len(parsed) == len(args):
            return tuple(_coerce(item, arg, path) for item, arg in zip(parsed, args, strict=True))
        raise ConfigError(f"{path} is {value!r}; expected a list of {len(args)} values")
    if kind is float and not isinstance(parsed, bool):
        try:
            return float(parsed)
        except (TypeError, ValueError):
            pass
    elif type(parsed) is kind:
        return parsed
    raise ConfigError(f"{path} is {value!r}; expected {kind.__name__}")
