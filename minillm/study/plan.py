"""Which cells a study has, in which order, and the configuration of each.

Per seed and size: `start` (what every method starts from), `minillm`, then the methods that are held to its tokens;
then the ablations of minillm at their size, and its variations at every size. The teacher comes first: its evaluation,
and its answers for seqkd.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from minillm.config.check import unknown
from minillm.config.recipe import Recipe, merged, read_yaml, recipe_from, run_from, split
from minillm.config.schema import ConfigError, RunConfig

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

    def recipe(self, cell: Cell, steps: int = 0) -> Recipe:
        """What the cell trains, in one stage; `steps` for those whose steps follow from minillm's tokens."""
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
        return recipe_from(cell.name, {**merged(*overrides), "stages": {cell.name: {}}})

    def evaluation(self, name: str) -> RunConfig:
        return run_from(split(merged(self.base, self.evaluate[name], {"log": {"samples": 4}}))[0])

    @property
    def answers(self) -> Path:
        """The teacher's answers to the prompts trained on."""
        return self.work / "teacher-answers.jsonl"


def load_study(path: str | Path, smoke: bool = False) -> Study:
    """Raises FileNotFoundError, or ConfigError for what is unknown or missing, in any cell."""
    tree = read_yaml("study", path, "recipes/study/study.yaml")
    for key in tree:
        if key not in SECTIONS:
            raise ConfigError(unknown("section of a study", str(key), SECTIONS))
    for key in NEEDED:
        if not tree.get(key):
            raise ConfigError(f"{path} has no section `{key}`, which a study needs")
    if smoke:
        tree = merged(tree, tree.get("smoke") or {})
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
            study.recipe(cell)
    for name in study.evaluate:
        study.evaluation(name)
    return study
