"""Recipes: configurations read from YAML, overridden by flags, checked before any work.

A *recipe* has the sections of a run, and those of its stages, which then hold for each stage; `stages:`, overrides for
them by name, in order on the same student; and optionally `smoke:`, overrides that make all of it short.
Precedence, lowest first: defaults, those of `objective.variant`, recipe, its stage, its smoke overrides, flags
(`--optim.lr=1e-5`, or for one stage `--stages.minillm.optim.lr=1e-5`).
"""

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from minillm.config.check import METHODS, check_run, check_stage, one_of, unknown
from minillm.config.parse import DEPTH, parse, shown
from minillm.config.schema import VARIANTS, ConfigError, ObjectiveConfig, RunConfig, StageConfig
from minillm.files import flatten, write_atomically

Tree = Mapping[str, Any]
STAGE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
NO_CHARACTER = re.compile(r"[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Recipe:
    """A run and its named stages, in order."""

    name: str
    run: RunConfig
    stages: dict[str, StageConfig]

    @property
    def training_sources(self) -> list[str]:
        """Data that the student learns from or is chosen by: nothing to evaluate it on."""
        data = [source for stage in self.stages.values() for source in (stage.data.train, stage.validation.data)]
        return [source for source in dict.fromkeys(data) if source]

    def to_dict(self) -> dict[str, Any]:
        """Everything resolved, in the form that `load_recipe` reads."""
        stages = {name: dataclasses.asdict(stage) for name, stage in self.stages.items()}
        return json.loads(json.dumps({**dataclasses.asdict(self.run), "stages": stages}))

    def digest(self) -> str:
        """Hash of everything resolved but the output directory, logging and where the models live: two runs with one
        digest ran the same."""
        tree = self.to_dict()
        del tree["output"], tree["log"], tree["parallel"]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def load_recipe(
    path: str | Path, flags: Sequence[str] = (), smoke: bool = False, overrides: Tree = types.MappingProxyType({})
) -> Recipe:
    """Read a recipe from YAML, apply nested `overrides` and `--section.key=value` flags, check every stage.

    Raises ConfigError for anything unknown, misplaced, mistyped or contradictory, FileNotFoundError for no file.
    """
    tree = read_yaml("recipe", path, "recipes/smollm2-cpu.yaml")
    layers = [tree]
    if smoke:
        if not isinstance(tree.get("smoke"), dict):
            raise ConfigError(f"{path} has no `smoke:` section, which --smoke would apply")
        layers.append(tree["smoke"])
    return recipe_from(Path(path).stem, *layers, overrides, parse_flags(flags))


def read_yaml(what: str, path: str | Path, example: str) -> dict[str, Any]:
    """Raises ConfigError for a file that is not YAML or no mapping, FileNotFoundError with an example for none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}: give the path of a YAML file, such as {example}")
    tree = parse(path.read_bytes(), str(path)) or {}  # UTF-8, or what its byte-order mark says
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; expected sections such as `model:` and `optim:`")
    return tree


def recipe_from(name: str, *layers: Tree) -> Recipe:
    """A checked recipe of nested mappings, each laid over those before; the first one names the stages."""
    for layer in layers:
        if not isinstance(layer.get("stages") or {}, Mapping):
            raise ConfigError(
                f"`stages` is {shown(layer['stages'])}; expected the stages by name, each with its sections"
            )
    stage_names = _stage_names(*layers)
    run_tree: dict[str, Any] = {}
    stage_trees: dict[str, dict[str, Any]] = {stage: {} for stage in stage_names}
    for layer in layers:
        for stage in layer.get("stages") or {}:
            if stage not in stage_names:
                raise ConfigError(unknown("stage", str(stage), stage_names))
        of_run, of_stages = split({key: value for key, value in layer.items() if key not in ("stages", "smoke")})
        merge(run_tree, of_run)
        for stage, tree in stage_trees.items():
            merge(tree, of_stages)
            merge(tree, only_of_stage((layer.get("stages") or {}).get(stage) or {}, stage))
    run = run_from(run_tree)
    stages = {}
    for stage, tree in stage_trees.items():
        stages[stage] = stage_from(tree)
        check_stage(stages[stage], run)
    return Recipe(name, run, stages)


def _stage_names(first: Tree, *over: Tree) -> list[str]:
    """Of the recipe, or the one method. Raises ConfigError for a name that files could not be named after."""
    if not first.get("stages"):
        method = merged(first, *over).get("method", StageConfig.method)
        one_of("method", method, METHODS)
        return [method]
    for name in first["stages"]:
        if not isinstance(name, str) or not STAGE_NAME.fullmatch(name):
            raise ConfigError(
                f"a stage is called {shown(name)}; its files are named after it: give letters, digits, - and _ alone, "
                "at most 100 of them"
            )
    return list(first["stages"])


def run_from(tree: Tree) -> RunConfig:
    """A checked RunConfig of nested mappings."""
    run = _build(RunConfig, tree, "")
    check_run(run)
    return run


def stage_from(tree: Tree) -> StageConfig:
    """A StageConfig of nested mappings, not yet checked against its run."""
    objective = tree.get("objective")
    if isinstance(objective, Mapping):
        variant = objective.get("variant", ObjectiveConfig.variant)
        one_of("objective.variant", variant, list(VARIANTS))
        tree = {**tree, "objective": {**VARIANTS[variant], **objective}}
    return _build(StageConfig, tree, "")


def split(tree: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of a run, and those of its stages, as they stand together at the top of a recipe."""
    run, stages = get_type_hints(RunConfig), get_type_hints(StageConfig)
    of_run: dict[str, Any] = {}
    of_stages: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in run and key not in stages:
            raise ConfigError(_unknown_key(str(key), ""))
        if key in run and key in stages and isinstance(value, Mapping):  # the section `data`
            names = get_type_hints(run[key])
            of_run[key] = {k: v for k, v in value.items() if k in names}
            of_stages[key] = {k: v for k, v in value.items() if k not in names}
        else:
            (of_run if key in run else of_stages)[key] = value
    return of_run, of_stages


def only_of_stage(tree: Tree, stage: str) -> Tree:
    """The tree itself. Raises ConfigError for what all stages share: there it would change nothing."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"`stages.{stage}` is {shown(tree)}; it holds sections: expected keys below it")
    misplaced = [path for path, _ in flatten(split(tree)[0])]
    if misplaced:
        raise ConfigError(
            f"stages.{stage}.{misplaced[0]} cannot differ between stages: write {misplaced[0]} at the top of the "
            f"recipe (--{misplaced[0]}=…), for the whole run"
        )
    return tree


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """`["--optim.lr=1e-5"]` → `{"optim": {"lr": "1e-5"}}`; values stay text until their field's type is known."""
    tree: dict[str, Any] = {}
    for flag in flags:
        name, equals, value = flag.partition("=")
        if not name.startswith("--") or not equals or name.count(".") > DEPTH:
            raise ConfigError(f"cannot read {shown(flag)}; overrides are written --section.key=value")
        merge(tree, nested({name[2:]: value}))
    return tree


def nested(tree: Tree) -> dict[str, Any]:
    """`{"optim.lr": 1}` → `{"optim": {"lr": 1}}`, at every level."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        first, dot, rest = str(key).partition(".")
        inner = {rest: value} if dot else value
        merge(result, {first: nested(inner) if isinstance(inner, Mapping) else inner})
    return result


def merge(base: dict[str, Any], over: Tree) -> None:
    """Lay `over` on `base`, section by section, in place. Raises ConfigError for keys below a value that is none."""
    for key, value in over.items():
        if isinstance(value, Mapping) and key in base:
            if not isinstance(base[key], dict):
                raise ConfigError(f"`{key}` is {shown(base[key])}, and keys below it are given as well: keep one")
            merge(base[key], value)
        else:
            base[key] = merged(value) if isinstance(value, Mapping) else value


def merged(*trees: Tree) -> dict[str, Any]:
    """A new tree, each laid over those before."""
    result: dict[str, Any] = {}
    for tree in trees:
        merge(result, tree)
    return result


def save(recipe: Recipe, path: Path) -> None:
    """Write everything resolved, so that the run can be read and repeated without its flags."""
    write_atomically(path, yaml.safe_dump(recipe.to_dict(), sort_keys=False))


def _build(cls: type, tree: Any, path: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"`{path}` is {shown(tree)}; it is a section: expected keys below it")
    kinds = get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in kinds:
            raise ConfigError(_unknown_key(str(key), path))
        is_section = dataclasses.is_dataclass(kinds[key])
        values[key] = _build(kinds[key], value, where) if is_section else _coerce(value, kinds[key], where)
    return cls(**values)


def _unknown_key(key: str, section: str) -> str:
    """With the place where a key of that name would be right, else the nearest name here."""
    known: dict[str, list[str]] = {"": ["stages", "smoke"]}
    for cls in (RunConfig, StageConfig):
        for name, kind in get_type_hints(cls).items():
            known[""] += [] if name in known[""] else [name]
            if dataclasses.is_dataclass(kind):
                known.setdefault(name, []).extend(get_type_hints(kind))
    elsewhere = [f"{name}.{key}" for name, keys in known.items() if name and key in keys]
    what = f"key in section `{section}`" if section else "section or key"
    if elsewhere:
        return f"unknown {what} {key!r}; did you mean {' or '.join(elsewhere)}?"
    return unknown(what, key, known[section])


def _coerce(value: Any, kind: Any, path: str) -> Any:
    """`value` as `kind`. Text is parsed: flags are text, and YAML 1.1 reads 1e-5 as text."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # T | None, or T | Literal[word]
        if type(None) in args and (value is None or value in ("none", "null")):
            return None
        words = [word for arg in args for word in typing.get_args(arg)]
        if value in words:
            return value
        try:
            return _coerce(value, args[0], path)
        except ConfigError as error:
            raise ConfigError(f"{error}{' or ' * bool(words)}{', '.join(words)}") from None
    parsed = parse(value, f"{path} = {shown(value)}") if isinstance(value, str) and kind is not str else value
    if origin is tuple:
        if isinstance(parsed, (list, tuple)) and len(parsed) == len(args):
            return tuple(_coerce(item, arg, path) for item, arg in zip(parsed, args, strict=True))
        raise ConfigError(f"{path} is {shown(value)}; expected a list of {len(args)} values")
    if origin is dict:
        if isinstance(parsed, Mapping):  # leaves of flags are text
            return {
                str(key): parse(item, f"{path}.{key} = {shown(item)}") if isinstance(item, str) else item
                for key, item in parsed.items()
            }
        raise ConfigError(f"{path} is {shown(value)}; expected a mapping, such as {{name: value}}")
    if kind is float and not isinstance(parsed, bool):
        try:
            return float(parsed)
        except (TypeError, ValueError, OverflowError):
            pass
    elif type(parsed) is kind:
        if kind is str and NO_CHARACTER.search(parsed):
            raise ConfigError(f"{path} is {shown(value)}; it holds a code that is no character, as no name does")
        return parsed
    raise ConfigError(f"{path} is {shown(value)}; expected {kind.__name__}")
