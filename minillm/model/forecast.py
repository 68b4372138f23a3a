"""`minillm estimate --gpus`: memory per GPU and seconds per step on a mesh of GPUs, before anything is loaded.

Nothing here is measured. Bytes and operations are counted by cost.py from the models' own code; seconds follow from
them and from the rates below, which are those of data sheets and of what collectives are known to reach:

    update   operations / (flops · MATMUL_SHARE) + bytes of the gradients' and shards' collectives / link
    decoding operations as above + per token: bytes of the weights / memory bandwidth + bytes of collectives / link
             + LATENCY for each of them; launches of kernels are not counted

A collective over the GPUs of one host goes over their links, over several hosts over one network card a GPU. Sharded
weights are gathered once per rollout, those of a teacher that reads what was sampled once per forward pass. A
tensor-parallel teacher, which spans the GPUs of a host, sums its states twice a layer and token, and gathers its
logits; where it draws, each GPU of a host decodes all sequences of the host.
"""

from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from minillm.config.recipe import Recipe
from minillm.config.schema import ConfigError, RunConfig, StageConfig
from minillm.model.cost import Cost, cost, skeletons
from minillm.model.layers import layers_of
from minillm.model.load import own_weights
from minillm.model.split import shares_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MATMUL_SHARE = 0.4
"""Of the peak operations per second, reached over a whole update."""
LATENCY = 15e-6
"""Seconds of a small collective."""
SPARE = 0.9
"""Of a GPU's memory, what weights, activations and caches may take: allocator and libraries need the rest."""
BUS = 50e9
"""Bytes per second from the host's memory."""
OF_TEACHER = ("caches of the teacher", "rollout of the teacher")
"""Memory and work that processes share which compute a teacher together, whatever they decode."""
NETWORK = 45e9
"""Bytes per second between hosts, for each GPU (400 Gb/s)."""


class Gpu(NamedTuple):
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes per second."""
    flops: float
    """Dense bfloat16 operations per second."""
    link: float
    """To the other GPUs of its host, bytes per second that collectives reach."""


GPUS = {
    "a100": Gpu(80e9, 2.0e12, 312e12, 240e9),
    "h100": Gpu(80e9, 3.35e12, 989e12, 360e9),
    "h200": Gpu(141e9, 4.8e12, 989e12, 360e9),
    "b200": Gpu(180e9, 8.0e12, 2250e12, 720e9),
    "l40s": Gpu(48e9, 0.86e12, 362e12, 26e9),
    "4090": Gpu(24e9, 1.0e12, 165e12, 20e9),
}


class Mesh(NamedTuple):
    """`hosts` × `size` GPUs of one kind."""

    gpu: Gpu
    size: int
    hosts: int = 1

    @property
    def gpus(self) -> int:
        return self.size * self.hosts


class Placement(NamedTuple):
    """As in the section `parallel`."""

    student: str
    """replicate | shard"""
    teacher: str
    """replicate | shard | tensor | offload; "" without a teacher"""


class Model(NamedTuple):
    """What the forecast knows of a model; bytes of its weights as they are read."""

    weights: int
    layers: int
    layer: int
    """Of the largest layer."""
    head: int
    hidden: int
    """Bytes of one state."""
    logits: int
    """Bytes of one row."""

    @classmethod
    def of(cls, model: "PreTrainedModel", itemsize: int) -> "Model":
        _, layers = layers_of(model)
        largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        rows, columns = model.get_output_embeddings().weight.shape
        whole = sum(p.numel() for p in model.parameters())
        hidden = model.config.get_text_config().hidden_size
        sizes = whole, largest, rows * columns, hidden, rows
        weights, layer, head, state, logits = (size * itemsize for size in sizes)
        return cls(weights, len(layers), layer, head, state, logits)


class Forecast(NamedTuple):
    placement: Placement
    memory: float
    """Bytes of a GPU at the peak."""
    update: float
    """Seconds of an optimiser step without its rollouts."""
    decode: float
    """Seconds of decoding per optimiser step."""

    @property
    def step(self) -> float:
        return self.update + self.decode


def parse_mesh(text: str) -> Mesh:
    """`8xh100`, or `2x8xh100` for two hosts of eight. Raises ConfigError."""
    *counts, name = text.lower().split("x")
    if name not in GPUS or not 1 <= len(counts) <= 2 or not all(c.isdecimal() and int(c) > 0 for c in counts):
        raise ConfigError(f"--gpus is {text!r}; expected 8xh100, or 2x8xh100 for two hosts; known: {', '.join(GPUS)}")
    size, *hosts = map(int, reversed(counts))
    return Mesh(GPUS[name], size, *hosts)


def token_seconds(mesh: Mesh, student: Model, teacher: Model | None, placement: Placement, rows: int) -> float:
    """Of one decoded token of `rows` sequences a GPU, both models side by side; what is in shards is gathered."""
    seconds = student.weights / mesh.gpu.bandwidth
    if teacher is None:
        return seconds
    share = mesh.size if placement.teacher == "tensor" else 1
    seconds += teacher.weights / share / mesh.gpu.bandwidth
    if placement.teacher == "tensor":
        sums = 2 * teacher.layers
        row = 2 * sums * teacher.hidden + teacher.logits
        moved = (mesh.size - 1) / mesh.size * rows * mesh.size * row  # of all ranks' rows
        seconds += moved / mesh.gpu.link + (sums + 1) * LATENCY
    return seconds


def gather_seconds(mesh: Mesh, weights: float) -> float:
    """Of gathering weights that the GPUs of a host hold in shards; each host has all of them."""
    return weights * (mesh.size - 1) / mesh.size / mesh.gpu.link


def forecasts(mesh: Mesh, run: RunConfig, stage: StageConfig) -> list[Forecast]:
    """Of every placement that the stage can run with, the simplest first."""
    (own, teachers), found = skeletons(run), cost(run, stage, mesh.gpus)
    itemsize = 2 if run.model.compute_dtype in ("auto", "bfloat16", "float16") else 4
    student = Model.of(own, itemsize)
    teacher = Model.of(teachers[0], teachers[0].dtype.itemsize) if teachers else None
    splits = bool(teachers) and shares_heads(teachers[0], mesh.size)
    of_teacher = ["replicate", "shard", *(["tensor"] if splits else []), "offload"]
    of_student = ["replicate", "shard"]
    if own_weights(run) or run.teachers or run.teacher.quantize or run.model.quantize:
        of_student, of_teacher = ["replicate"], ["replicate"]  # of whole models alone
    placements = product(of_student, of_teacher if teacher is not None else [""])
    return [_forecast(mesh, stage, found, student, teacher, Placement(*each)) for each in placements]


def _forecast(
    mesh: Mesh, stage: StageConfig, found: Cost, student: Model, teacher: Model | None, placement: Placement
) -> Forecast:
    size, gpu, method = mesh.size, mesh.gpu, stage.method
    sharded = placement.student == "shard"
    held = dict(found.held)
    if sharded:  # weights, gradient and moments; whole are the largest layer while it computes, all for a rollout
        held |= {name: held[name] // size for name in ("student", "gradients", "AdamW")}
    if teacher is not None and placement.teacher != "replicate":
        held["teacher"] = {
            "shard": teacher.weights // size + 2 * teacher.layer + teacher.head,
            "tensor": teacher.weights // size,
            "offload": 2 * teacher.layer + teacher.head,
        }[placement.teacher]
    draws = method == "seqkd" or (method == "minillm" and stage.rollout.alpha > 0)
    together = size if draws and placement.teacher == "tensor" else 1  # each with its heads of the teacher's caches
    rollout = sum(x if name == OF_TEACHER[0] else x * together for name, x in found.rollout.items())
    update = sum(found.update.values())
    if sharded:
        rollout, update = rollout + student.weights, update + 2 * student.layer
    in_parts = placement.teacher in ("shard", "offload")
    if teacher is not None and draws and in_parts:
        rollout += teacher.weights
    memory = sum(held.values()) + max(rollout if found.rollout else 0, update)

    operations = (
        sum(value for phase, value in found.work.items() if not phase.startswith("rollout")) / stage.optim.steps
    )
    seconds = operations / (gpu.flops * MATMUL_SHARE)
    gradient = found.held["gradients"]
    if sharded:  # gathered for the forward and the backward pass; the gradient scattered; hosts sum their shards
        seconds += 2 * gather_seconds(mesh, student.weights) + gather_seconds(mesh, gradient)
        gradient = gradient // size
    ranks, rate = (mesh.hosts, NETWORK) if sharded else (mesh.gpus, NETWORK if mesh.hosts > 1 else gpu.link)
    seconds += 2 * gradient * (ranks - 1) / ranks / rate
    if teacher is not None and in_parts and not draws and method in ("kd", "gkd", "minillm"):
        moved = gather_seconds(mesh, teacher.weights) if placement.teacher == "shard" else teacher.weights / BUS
        seconds += max(0.0, moved - operations / (gpu.flops * MATMUL_SHARE))  # behind the work, where there is enough

    decode = 0.0
    if method in ("minillm", "gkd"):
        rows = -(-(stage.optim.batch_size if method == "gkd" else stage.rollout.batch_size) // mesh.gpus)
        token = token_seconds(mesh, student, teacher if draws else None, placement, rows)
        passes = stage.rollout.on_policy
        if method == "minillm":
            passes = stage.optim.batch_size / (stage.rollout.epochs * stage.rollout.batch_size)
        gathered = gather_seconds(mesh, student.weights) if sharded else 0.0
        if teacher is not None and draws and in_parts:
            gathered += (
                gather_seconds(mesh, teacher.weights) if placement.teacher == "shard" else teacher.weights / BUS
            )
        decode = passes * (stage.rollout.longest * token + gathered)
        work = found.work["rollout"] * together + found.work.get(OF_TEACHER[1], 0)
        decode += work / stage.optim.steps / (gpu.flops * MATMUL_SHARE)
    return Forecast(placement, memory, seconds, decode)


def describe_mesh(recipe: Recipe, text: str) -> str:
    """A table of the placements for each stage, and the first that fits."""
    mesh = parse_mesh(text)
    room = mesh.gpu.memory * SPARE
    lines = [
        f"{text}: {mesh.gpus} GPUs, {mesh.gpu.memory / 1e9:.0f} GB each; computed from counted bytes and operations "
        "and the rates of data sheets, not measured"
    ]
    for name, stage in recipe.stages.items():
        found = forecasts(mesh, recipe.run, stage)
        lines += ["", f"{name} ({stage.method})", "  student    teacher    GB a GPU   seconds a step (of it decoding)"]
        for each in found:
            fits = "" if each.memory <= room else "   does not fit"
            lines.append(
                f"  {each.placement.student:<10} {each.placement.teacher or '-':<10} {each.memory / 1e9:8.1f}   "
                f"{each.step:8.2f} ({each.decode:.2f}){fits}"
            )
        first = next((each for each in found if each.memory <= room), None)
        if first is None:
            lines.append("  nothing fits: take more GPUs, model.recompute, or smaller micro-batches and rollouts")
        else:
            keys = {"student": first.placement.student, "teacher": first.placement.teacher}
            keys |= {"hosts": str(mesh.hosts)} if mesh.hosts > 1 else {}
            told = ", ".join(f"{key}: {value}" for key, value in keys.items() if value)
            lines.append(f"  the first that fits: parallel: {{{told}}}")
    return "\n".join(lines)
