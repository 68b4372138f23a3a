"""Which cells a study has, in which order, what each needs, and the configuration of each.

The teacher is trained first, then the start that all methods share, cut from it. A learning rate (or whatever else
the `grid` of a training names) is chosen at the first seed by the validation prompts, with a cell for each candidate.
Then, per seed, `minillm` and the methods that are held to its response tokens, at what was chosen; then the ablations
and variations of minillm. The cells of seeds are evaluated on the test prompts, candidates are not.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from minillm.config.check import one_of, unknown
from minillm.config.recipe import Recipe, merged, nested, read_yaml, recipe_from, run_from, split
from minillm.config.schema import ConfigError, RunConfig
from minillm.evaluation.measure import PARTS
from minillm.evaluation.result import START, TEACHER

REFERENCE = "minillm"
ROUGE, LOSS = "rouge_l/sampled", "loss"
NEEDED = ("results", "work", "seeds", "base", "teacher", "start", "gate", "methods", "validate", "evaluate")
TEXTS = ("protocol", "findings")
SECTIONS = (*NEEDED, "ablations", "variations", "appendix", *TEXTS)
PROFILES = ("smoke", "card")
"""Sections that override all others where they are asked for."""


class Cell(NamedTuple):
    """One training and its evaluations: of a seed, or of a candidate."""

    name: str
    seed: int
    candidate: str = ""
    """The value of the grid that it tries; empty in the cells of seeds, which take the one chosen."""

    @property
    def path(self) -> str:
        return f"grid/{self.name}-{self.candidate}" if self.candidate else f"{self.name}-{self.seed}"


class Grid(NamedTuple):
    """Values of one key of a training, of which the validation chooses."""

    key: str
    values: list[Any]
    by: str = ROUGE
    """`rouge_l/sampled`, the higher the better, or `loss`, the lower."""

    @property
    def candidates(self) -> list[str]:
        return [f"{self.key.rpartition('.')[2]}={value}" for value in self.values]

    def tree(self, candidate: str) -> dict[str, Any]:
        return nested({self.key: self.values[self.candidates.index(candidate)]})


@dataclass(frozen=True)
class Study:
    results: Path
    work: Path
    seeds: list[int]
    base: dict[str, Any]
    trainings: dict[str, dict[str, Any]]
    """By name: the teacher, the start, the methods (minillm first), ablations and variations."""
    grids: dict[str, Grid]
    methods: list[str]
    ablations: list[str]
    variations: list[str]
    gate: float
    """How far the teacher's ROUGE-L is above the start's on the validation prompts, or there is nothing to test."""
    validate: dict[str, Any]
    evaluate: dict[str, dict[str, Any]]
    parts: dict[str, list[str]]
    """What is measured on each set of `evaluate`."""
    protocol: str = ""
    """What was laid down before the first cell ran, in Markdown."""
    findings: str = ""
    """What came out, in Markdown."""
    appendix: dict[str, Any] = field(default_factory=dict)
    """An earlier study: `results`, and a `text` about it."""

    def cells(self) -> list[Cell]:
        """All of them, in the order they run."""
        found = [*self.candidates(TEACHER), self.teacher, *self.candidates(START)]
        found += [Cell(START, seed) for seed in self.seeds]
        found += [cell for name in self.methods for cell in self.candidates(name)]
        found += [Cell(name, seed) for seed in self.seeds for name in self.methods]
        return found + [Cell(name, self.seeds[0]) for name in (*self.ablations, *self.variations)]

    @property
    def teacher(self) -> Cell:
        return Cell(TEACHER, self.seeds[0])

    def candidates(self, name: str) -> list[Cell]:
        grid = self.grids.get(name)
        return [Cell(name, self.seeds[0], value) for value in grid.candidates] if grid else []

    def result(self, cell: Cell) -> Path:
        return self.results / f"{cell.path}.json"

    def model(self, cell: Cell) -> Path:
        """Directory of what the cell has trained."""
        return self.work / cell.path / "model"

    def unfinished(self) -> list[Cell]:
        return [cell for cell in self.cells() if not self.result(cell).exists()]

    def needs(self, cell: Cell) -> list[Cell]:
        """What must be done before it: what it is chosen among, learns from, begins from and is held to."""
        found = [] if cell.candidate else self.candidates(self.base_of(cell.name))
        if cell.name != TEACHER:
            found.append(self.teacher)
        if cell.name not in (TEACHER, START):
            found += [Cell(START, self.seeds[0]), Cell(START, cell.seed)]  # the first decides the gate
        return [*found, *(self.held_to(cell.seed) if self.matched(cell.name) else [])]

    def matched(self, name: str) -> bool:
        """Whether it takes as many steps as reach minillm's response tokens."""
        return name in self.methods and name != REFERENCE

    def held_to(self, seed: int) -> list[Cell]:
        """The trainings of minillm at that seed, one of which says how many tokens the other methods learn from."""
        return (self.candidates(REFERENCE) if seed == self.seeds[0] else []) or [Cell(REFERENCE, seed)]

    def base_of(self, name: str) -> str:
        """The training that it changes, or itself; the choice from a grid is that one's."""
        return REFERENCE if name in (*self.ablations, *self.variations) else name

    def lock(self, name: str) -> FileLock:
        """Held by the one run that is at this cell (its path) or at the answers; whatever ends a run frees it."""
        path = self.work / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def recipe(self, cell: Cell, chosen: str = "", steps: int = 0) -> Recipe:
        """What the cell trains, in one stage, at the candidate `chosen`, where it is none itself; `steps` for those
        whose steps follow from minillm's tokens."""
        source, candidate = self.base_of(cell.name), cell.candidate or chosen
        layers = [self.base, {"seed": cell.seed, "output": str(self.work / cell.path)}]
        if cell.name == TEACHER:
            layers.append({"model": {"student": self.base["model"]["teacher"], "teacher": ""}})
        else:
            layers.append({"model": {"teacher": str(self.model(self.teacher))}})
        if cell.name not in (TEACHER, START):
            beginning = str(self.model(Cell(START, cell.seed)))
            layers.append({"model": {"student": beginning}, "data": {"teacher_answers": str(self.answers)}})
        layers += [self.trainings[name] for name in dict.fromkeys((source, cell.name))]
        layers += [self.grids[source].tree(candidate)] if candidate else []
        layers += [{"optim": {"steps": steps}}] if steps else []
        return recipe_from(cell.name, {**merged(*layers), "stages": {cell.name: {}}})

    def evaluation(self, name: str) -> RunConfig:
        """How a model is evaluated on a set of `evaluate`, or to be chosen (`validate`)."""
        tree = self.validate if name == "validate" else self.evaluate[name]
        return run_from(split(merged(self.base, tree, {"log": {"samples": 4}}))[0])

    @property
    def answers(self) -> Path:
        """The teacher's answers to the prompts trained on."""
        return self.work / "teacher-answers.jsonl"


def load_study(path: str | Path, profile: str = "") -> Study:
    """Read a study, with the section of that profile laid over it.

    Raises FileNotFoundError, or ConfigError for what is unknown or missing, in any cell.
    """
    tree = read_yaml("study", path, "recipes/study/study.yaml")
    for key in tree:
        if key not in (*SECTIONS, *PROFILES):
            raise ConfigError(unknown("section of a study", str(key), (*SECTIONS, *PROFILES)))
    if profile and not tree.get(profile):
        raise ConfigError(f"{path} has no section `{profile}`")
    tree = merged(tree, tree[profile] if profile else {})
    for key in NEEDED:
        if tree.get(key) in (None, "", [], {}):
            raise ConfigError(f"{path} has no section `{key}`, which a study needs")
    if REFERENCE not in tree["methods"]:
        raise ConfigError(f"{path}: the other methods are held to the tokens of {REFERENCE}, which `methods` lacks")
    ablations, variations = (tree.get(key) or {} for key in ("ablations", "variations"))
    methods = {REFERENCE: tree["methods"].pop(REFERENCE), **tree["methods"]}  # first: the others follow its tokens
    trainings = {TEACHER: tree["teacher"], START: tree["start"], **methods, **ablations, **variations}
    grids = {name: _grid(name, training.pop("grid")) for name, training in trainings.items() if "grid" in training}
    if changed := [name for name in (*ablations, *variations) if name in grids]:
        raise ConfigError(f"{path}: {changed[0]} has a grid; it takes what was chosen for {REFERENCE}")
    parts = {name: training.pop("parts", ["samples"]) for name, training in tree["evaluate"].items()}
    for name, asked in parts.items():
        for part in asked:
            one_of(f"evaluate.{name}.parts", part, PARTS)
    study = Study(
        results=Path(tree["results"]),
        work=Path(tree["work"]),
        trainings=trainings,
        grids=grids,
        methods=list(methods),
        ablations=list(ablations),
        variations=list(variations),
        parts=parts,
        **{key: tree[key] for key in ("seeds", "base", "gate", "validate", "evaluate")},
        **{key: tree[key] for key in (*TEXTS, "appendix") if key in tree},
    )
    for cell in study.cells():
        study.recipe(cell)
    for name in ("validate", *study.evaluate):
        study.evaluation(name)
    return study


def _grid(name: str, tree: Any) -> Grid:
    if not isinstance(tree, dict) or not {"key", "values"} <= tree.keys() <= set(Grid._fields) or not tree["values"]:
        raise ConfigError(f"grid of {name} is {tree!r}; expected {{key: optim.lr, values: [1.0e-5, 1.0e-4]}}")
    one_of(f"{name}.grid.by", tree.get("by", ROUGE), (ROUGE, LOSS))
    return Grid(**tree)
