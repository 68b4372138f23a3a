"""What the validation decides: the candidate of a grid, whether the study can test anything, and the best rival."""

import json
from typing import Any

from minillm.config.schema import ConfigError
from minillm.evaluation.means import Mean
from minillm.evaluation.result import START, TEACHER, Evaluation
from minillm.study.plan import LOSS, REFERENCE, ROUGE, Cell, Study


def read(study: Study, cell: Cell) -> dict[str, Any]:
    """What the cell has written."""
    return json.loads(study.result(cell).read_text(encoding="utf-8"))


def validation(study: Study, cell: Cell) -> dict[str, Mean]:
    """The means of a candidate, or of a cell of the first seed, on the validation prompts."""
    return Evaluation.from_dict(read(study, cell)["validation"]).means


def choose(study: Study, name: str) -> str:
    """The best candidate of a training; empty where it has no grid."""
    grid, candidates = study.grids.get(study.base_of(name)), study.candidates(study.base_of(name))
    if grid is None:
        return ""
    sign = -1 if grid.by == LOSS else 1
    return max(candidates, key=lambda cell: sign * validation(study, cell)[grid.by].mean).candidate


def budget(study: Study, seed: int) -> float:
    """The response tokens that minillm learnt from at that seed, each pass counted."""
    cells, chosen = study.held_to(seed), choose(study, REFERENCE)
    (held,) = [cell for cell in cells if len(cells) == 1 or cell.candidate == chosen]
    return read(study, held)["training"]["response_tokens"]


def headroom(study: Study) -> float:
    """ROUGE-L of the teacher minus that of the start, on the validation prompts."""
    teacher, start = (validation(study, Cell(name, study.seeds[0]))[ROUGE].mean for name in (TEACHER, START))
    return teacher - start


def check_gate(study: Study) -> None:
    """Raises ConfigError where the teacher is too little ahead: imitating it could not win."""
    if (found := headroom(study)) < study.gate:
        raise ConfigError(
            f"the teacher's ROUGE-L is {found:.2f} above the start's on the validation prompts, the gate asks for "
            f"{study.gate}: the claim is untestable with this pair. Cut more layers (start.model.drop_layers) or "
            f"train the teacher longer, and delete {study.results} and {study.work}"
        )


def best_rival(study: Study) -> str:
    """The method beside minillm with the highest ROUGE-L on the validation prompts."""

    def score(name: str) -> float:
        return validation(study, Cell(name, study.seeds[0], choose(study, name)))[ROUGE].mean

    return max((name for name in study.methods if name != REFERENCE), key=score)
