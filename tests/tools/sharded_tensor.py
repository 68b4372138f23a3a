"""Losses over the rows of two processes that compute a teacher together: what they tell each other, who is blamed."""

import torch
from accelerate import PartialState
from sharded_models import FOLDER, V, build
from torch import distributed

from minillm.config.parallel import ParallelConfig
from minillm.config.schema import ConfigError, EvalConfig
from minillm.doctor import CHECKS, examine
from minillm.evaluation.divergence import draw, references
from minillm.train import loop
from minillm.train.loop import METHODS
from minillm.train.selection import Selection

COPIES = ParallelConfig(teacher="tensor")


def examined(where: ParallelConfig) -> dict:
    """What the doctor finds, where the teacher may lie in parts."""
    checks = [name for name in CHECKS if name != "memory"]  # which asks the files of the models
    contexts = {method: build(method, where) for method in ("kd", "minillm")}
    return {
        method: {name: finding.status for name, finding in examine(context, checks).items()}
        for method, context in contexts.items()
    }


def measured(where: ParallelConfig) -> dict:
    """What validation and an evaluation measure, where the teacher's head may be split."""
    context = build("kd", where)
    student, teacher, examples = context.student, context.teacher, context.examples[:5]
    settings = EvalConfig(samples=2, sample_tokens=6, batch_size=4)
    sampled = [draw(*pair, examples, settings, context.ends) for pair in ((student, teacher), (teacher, student))]
    tables = [x for each in sampled for x in (each.to_other, each.from_other)]
    numbers = [
        *(float(x.sum()) for x in tables),
        *(mean.mean for mean in references(student, teacher, examples, settings)),
        Selection(context, METHODS["kd"](context, FOLDER), FOLDER)._loss(METHODS["kd"](context, FOLDER)),
    ]
    return {"numbers": numbers}


def unshared() -> dict:
    """Three processes, and a teacher of four heads."""
    try:
        build("kd", COPIES)
    except ConfigError as error:
        return {"told": str(error)}
    return {"told": ""}


def joined() -> dict:
    """Shapes of what is gathered and added for the loss of a micro-batch, and what a process holds of the teacher."""
    context = build("minillm", COPIES)
    part = METHODS["minillm"](context, FOLDER).step(1).parts[0]
    batch = part.batch(part.examples[:2])
    told: dict[str, list] = {"all_gather": [], "all_reduce": []}
    real = {name: getattr(distributed, name) for name in told}

    def noted(name):
        def call(first, second=None, **options):
            told[name].append(list((first if second is None else second).shape))
            return real[name](first, **options) if second is None else real[name](first, second, **options)

        return call

    for name in told:
        setattr(distributed, name, noted(name))
    try:
        part.loss(context.student.output(batch), batch)["loss"].backward()
    finally:
        for name in told:
            setattr(distributed, name, real[name])
    rows = torch.tensor([len(batch.targets)])
    everyone = [torch.zeros_like(rows) for _ in range(2)]
    distributed.all_gather(everyone, rows)
    teacher = list(context.teacher.model.parameters())
    matrices = [p for p in teacher if p.dim() == 2]
    return {
        **told,
        "rows": [int(n) for n in everyone],
        "head": [*context.teacher.head.weight.to_local().shape],
        "held": sum(p.to_local().untyped_storage().nbytes() for p in matrices),
        "all": sum(p.nbytes for p in matrices),
        "vocabulary": V,
    }


def blamed_together() -> dict:
    """Which example is named, where the losses of all processes are joined."""
    context = build("kd", COPIES)
    parts = METHODS["kd"](context, FOLDER).step(1).parts
    bad = parts[0].examples[2] if PartialState().process_index == 1 else None
    token = torch.tensor([0])
    if bad is not None:
        others = {t for e in context.examples if e is not bad for t in (*e.prompt, *e.response)}
        token[0] = next(t for t in bad.prompt if t not in others)
    distributed.broadcast(token, 1)
    with torch.no_grad():
        context.student.model.model.embed_tokens.weight[token] = float("nan")
    where = [e.record.where for e in context.examples if int(token) in e.prompt]
    return {"told": loop.blame(context, parts), "where": where[0]}
