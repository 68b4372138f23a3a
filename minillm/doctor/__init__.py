"""Whether the loss about to be minimised is the one that is meant, tried on the real models and data before the run.

Each check looks for one failure that trains without a word, says what it found and what to do. `minillm doctor RECIPE`
runs them all, in about a minute; a run begins with those of `QUICK`, which need a few forward passes. No weights, no
random state and no files are changed.
"""

from collections.abc import Callable, Iterable

from minillm.config.schema import ConfigError
from minillm.doctor import inputs, objective
from minillm.doctor.patient import Finding, Patient
from minillm.train.context import Context

CHECKS: dict[str, Callable[[Patient], Finding]] = {
    "memory": inputs.memory,
    "formula of the loss": objective.formula,
    "teacher knows something": inputs.teacher_knows_something,
    "targets aligned": inputs.aligned,
    "padded columns": inputs.padding,
    "end of a response": inputs.ends,
    "teacher into itself": objective.teacher_into_itself,
    "gradient": objective.slope,
    "own samples": objective.own_samples,
    "rollout and update": objective.rollout_and_update,
    "templates": inputs.templates,
    "tokens read alike": inputs.decoding,
    "teacher on student text": inputs.reliability,
}
QUICK = ("formula of the loss", "teacher knows something", "targets aligned")
"""Those that a run begins with."""


def examine(context: Context, names: Iterable[str] = tuple(CHECKS)) -> dict[str, Finding]:
    """The findings of these checks on a stage, as its models are now."""
    patient = Patient.of(context)
    return {name: CHECKS[name](patient) for name in names}


def refuse(stage: str, context: Context) -> None:
    """Raise ConfigError where a quick check finds that the stage's loss is not the one that is meant."""
    for name, finding in examine(context, QUICK).items():
        if finding.status == "wrong":
            raise ConfigError(
                f"{stage}: {name}: {finding.found}. {finding.mend[:1].upper()}{finding.mend[1:]}. `minillm doctor` "
                "examines the rest; --no-doctor trains all the same"
            )


def describe(findings: dict[str, Finding]) -> str:
    """A line for each check, and what to do below those that did not pass."""
    lines = []
    for name, finding in findings.items():
        lines.append(f"  {finding.status:8} {name:24} {finding.found}")
        if finding.mend:
            lines.append(f"{'':36} {finding.mend}")
    return "\n".join(lines)
