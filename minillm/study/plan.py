"""Which cells a study has, in which order, and the configuration of each.

Per seed and size: `start` (what every method starts from), `minillm`, then the methods that are held to its tokens;
then the ablations of minillm at their size, and its variations at every size. The teacher comes first: its evaluation,
and its answers for seqkd.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from filelock import FileLock

from minillm.config.recipe import config_from, merge
from minillm.config.schema import Config, ConfigError, check, unknown

TEACHER, START, REFERENCE = "teacher", "start", "minillm"
NEEDED = ("results", "work", "seeds", "sizes", "base", "start", "methods", "ablations", "evaluate")
SECTIONS = (*NEEDED, "variations", "notes", "smoke")


class Cell(NamedTuple):
    """One training and its evaluations, or the teacher's evaluations alone."""

    size: str
    name: str
    seed: int

    @property
    def path(self) -> str:
        return TEACHER if self.name == TEACHER else f"{self.size}/{self.name}-{self.seed}"


@dataclass(frozen=True)
class Study:
    results: Path
    work: Path
    seeds: list[int]
    sizes: dict[str, dict[str, Any]]
    base: dict[str, Any]
    start: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    ablations: dict[str, dict[str, Any]]
    ablated_size: str
    evaluate: dict[str, dict[str, Any]]
    variations: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: str = ""
    """What a reader of the page should know beside the numbers, in Markdown."""

    def cells(self) -> list[Cell]:
        """All of them, in the order they run: one seed is complete before the next begins."""
        found = [Cell("", TEACHER, 0)]
        for seed in self.seeds:
            found += [Cell(size, name, seed) for size in self.sizes for name in (START, *self.methods)]
            found += [Cell(self.ablated_size, name, seed) for name in self.ablations]
            found += [Cell(size, name, seed) for size in self.sizes for name in self.variations]
        return found

    def result(self, cell: Cell) -> Path:
        return self.results / f"{cell.path}.json"

    def unfinished(self) -> list[Cell]:
        return [cell for cell in self.cells() if not self.result(cell).exists()]

    def needs(self, cell: Cell) -> list[Cell]:
        """What must be done before it: what it begins from, learns from, and is held to the tokens of."""
        if cell.name in (TEACHER, START):
            return []
        reference = [Cell(cell.size, REFERENCE, cell.seed)] if self.matched(cell) else []
        return [Cell("", TEACHER, 0), Cell(cell.size, START, cell.seed), *reference]

    def lock(self, name: str) -> FileLock:
        """Held by the one run that is at this cell (its path) or at the answers; whatever ends a run frees it."""
        path = self.work / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def matched(self, cell: Cell) -> bool:
        """Whether the cell takes as many steps as reach minillm's tokens."""
        return cell.name in self.methods and cell.name != REFERENCE

    def config(self, cell: Cell, steps: int = 0) -> Config:
        """What the cell trains; `steps` for those whose steps follow from minillm's tokens."""
        overrides = [self.base, {"seed": cell.seed, "output": str(self.work / cell.path)}]
        if cell.name == START:
            overrides += [self.start, self.sizes[cell.size]]
        else:
            beginning = self.work / Cell(cell.size, START, cell.seed).path / "model"
            overrides += [{"model": {"student": str(beginning)}}]
            changes = {**self.ablations, **self.variations}
            overrides += [self.methods[REFERENCE if cell.name in changes else cell.name], changes.get(cell.name, {})]
            overrides += [{"data": {"teacher_answers": str(self.answers)}}]
        if steps:
            overrides.append({"optim": {"steps": steps}})
        config = config_from(_merged(*overrides))
        check(config)
        return config

    def evaluation(self, name: str) -> Config:
        return config_from(_merged(self.base, self.evaluate[name], {"log": {"samples": 4}}))

    @property
    def answers(self) -> Path:
        """The teacher's answers to the prompts trained on."""
        return self.work / "teacher-answers.jsonl"


def load_study(path: str | Path, smoke: bool = False) -> Study:
    """Raises FileNotFoundError, or ConfigError for what is unknown or missing, in any cell."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no study at {path}: give the path of a YAML file, such as recipes/study/study.yaml")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is no study: expected the sections {', '.join(SECTIONS)}")
    for key in tree:
        if key not in SECTIONS:
            raise ConfigError(unknown("section of a study", str(key), SECTIONS))
    for key in NEEDED:
        if not tree.get(key):
            raise ConfigError(f"{path} has no section `{key}`, which a study needs")
    if smoke:
        tree = _merged(tree, tree.get("smoke") or {})
    tree.pop("smoke", None)
    if REFERENCE not in tree["methods"]:
        raise ConfigError(f"{path}: the other methods are held to the tokens of {REFERENCE}, which `methods` lacks")
    ablations = dict(tree.pop("ablations"))
    size = ablations.pop("size", None)
    if size not in tree["sizes"]:
        raise ConfigError(unknown("value of ablations.size:", str(size), list(tree["sizes"])))
    methods = {REFERENCE: tree["methods"].pop(REFERENCE), **tree["methods"]}  # first: the others follow its tokens
    paths = {key: Path(tree[key]) for key in ("results", "work")}
    study = Study(**(tree | paths | {"methods": methods}), ablations=ablations, ablated_size=size)
    for cell in study.cells():
        if cell.name != TEACHER:
            study.config(cell)
    for name in study.evaluate:
        study.evaluation(name)
    return study


def _merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for tree in trees:
        merge(result, tree)
    return result
