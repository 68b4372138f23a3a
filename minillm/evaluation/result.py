"""`Evaluation`, the one result of measuring a model, and its JSON.

The JSON nests the means by the two parts of their names, `{"reverse_kl": {"own_samples": {"mean": …}}}`. What was not
measured is absent; what is undefined, such as the standard error of a single prompt, is null, and NaN in Python.
"""

import math
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from minillm.evaluation.calibration import Reliability
from minillm.evaluation.exposure import ExposureBias, Reaching
from minillm.evaluation.means import Mean, Seeds

OWN, REFERENCES, ROUGE = "reverse_kl/own_samples", "reverse_kl/references", "rouge_l/greedy"
MEANS = (ROUGE, "rouge_l/sampled", "exact_match/greedy", "exact_match/sampled", "loss", OWN, REFERENCES,
         "forward_kl/teacher_samples", "forward_kl/references")  # fmt: skip
"""Names of all means that can be measured."""
START, TEACHER = "start", "teacher"
"""Names of the evaluations of a run that belong to no stage: of the student before the first, and of the teacher."""
ABOUT = ("model", "teacher", "data", "records", "parameters", "command", "environment")


@dataclass(frozen=True)
class Length:
    """Of responses, in tokens, end-of-sequence included."""

    mean: float
    at_limit: float
    """Share of the responses that the limit of tokens cut."""


@dataclass(frozen=True)
class Responses:
    """What a model responded to one prompt; None for what was not decoded."""

    prompt: str
    references: tuple[str, ...]
    greedy: str | None
    sampled: str | None
    """The sample of the first seed."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured of one model on one set of prompts."""

    prompts: int
    """Number of prompts."""
    generation: dict[str, Any]
    """The settings that decide what is decoded. Evaluations that differ here are not comparable."""
    means: dict[str, Mean]
    """By names of `MEANS`: ROUGE-L (0 to 100), exact match (percent), and, in nats per token, the loss on references
    and the KL divergences from the teacher."""
    by_reference_length: dict[str, dict[str, Mean]] = field(default_factory=dict)
    """The scores again, over the prompts of each bucket of text.py; an empty bucket has none."""
    distinct: dict[str, Seeds] = field(default_factory=dict)
    """Percentage of different n-grams in the samples, by n = "1" … "4"."""
    length: dict[str, Length] = field(default_factory=dict)
    """By `greedy` and `sampled`."""
    reference_length: float | None = None
    """Mean tokens of the references, end-of-sequence not included."""
    calibration: dict[str, Reliability] = field(default_factory=dict)
    """By `next_token` and, where the records have options, `options`."""
    exposure_bias: ExposureBias | None = None
    tokens_per_second: float | None = None
    """Of greedy decoding."""
    responses: tuple[Responses, ...] = ()
    """To the first prompts, `log.samples` of them."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that each part took."""
    about: dict[str, Any] = field(default_factory=dict)
    """Keys of `ABOUT`: which model on which data, by which command, in which environment."""

    def to_dict(self, per_prompt: bool = True) -> dict[str, Any]:
        """As JSON; `from_dict` gives the same evaluation again. Without `per_prompt` it is short, but can no longer be
        paired with another one (`means.difference`)."""
        tree: dict[str, Any] = {**self.about, "prompts": self.prompts, "generation": self.generation}
        for name, mean in self.means.items():
            metric, _, along = name.partition("/")
            tree |= {metric: tree.get(metric, {}) | {along: mean.to_dict()} if along else mean.to_dict()}
        buckets = {
            name: {"prompts": max((m.prompts for m in part.values()), default=0)}
            | {key: mean.to_dict() for key, mean in part.items()}
            for name, part in self.by_reference_length.items()
        }
        length = {**self.length, "references": self.reference_length} if self.length else {}
        tree |= {"by_reference_length": buckets, "distinct": {n: s.to_dict() for n, s in self.distinct.items()}}
        tree |= {"length": length, "calibration": self.calibration, "exposure_bias": self.exposure_bias}
        tree |= {"tokens_per_second": self.tokens_per_second, "responses": self.responses, "seconds": self.seconds}
        if per_prompt:
            tree["per_prompt"] = {name: mean.values_per_prompt() for name, mean in self.means.items()}
        return plain({key: value for key, value in tree.items() if value not in (None, {}, ())})

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Evaluation":
        """Of `to_dict`'s JSON, with or without the values per prompt. Raises KeyError for another JSON."""
        prompts, generation = tree["prompts"], tree["generation"]
        defined = _restored({k: v for k, v in tree.items() if k not in (*ABOUT, "generation", "responses")})
        means = {}
        for name in MEANS:
            metric, _, along = name.partition("/")
            found = defined.get(metric, {}).get(along) if along else defined.get(metric)
            if found:
                means[name] = Mean.from_dict(found, defined.get("per_prompt", {}).get(name, ()))
        length = dict(defined.get("length", {}))
        reference_length = length.pop("references", None)
        bias = defined.get("exposure_bias")
        return cls(
            prompts=prompts,
            generation=generation,
            means=means,
            by_reference_length={
                name: {key: Mean.from_dict(mean) for key, mean in part.items() if key != "prompts"}
                for name, part in defined.get("by_reference_length", {}).items()
            },
            distinct={n: Seeds(tuple(part["by_seed"])) for n, part in defined.get("distinct", {}).items()},
            length={way: Length(**part) for way, part in length.items()},
            reference_length=reference_length,
            calibration={what: Reliability.from_dict(part) for what, part in defined.get("calibration", {}).items()},
            exposure_bias=bias and ExposureBias(**{**bias, "samples_reaching": Reaching(**bias["samples_reaching"])}),
            tokens_per_second=defined.get("tokens_per_second"),
            responses=tuple(
                Responses(**{**each, "references": tuple(each["references"])}) for each in tree.get("responses", ())
            ),
            seconds=defined.get("seconds", {}),
            about={key: tree[key] for key in ABOUT if key in tree},
        )


def plain(tree: Any) -> Any:
    """Dataclasses as dicts, tuples as lists, NaN as None: what JSON knows."""
    if is_dataclass(tree):
        tree = vars(tree)
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree


def _restored(tree: Any) -> Any:
    """None as NaN again."""
    if isinstance(tree, dict):
        return {key: _restored(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_restored(value) for value in tree]
    return math.nan if tree is None else tree
