"""What a run will need, before anything is loaded: the memory and the work of each stage, of one process.

The models are built without weights and run once on tensors without storage, at the longest sequences that the limits
of `data` and `rollout` allow: what autograd saves, what the caches hold and the floating-point operations are counted
op by op in the model's own code. Not counted: what the allocator, the libraries and temporaries take, and validation.

Legend: B sequences, T tokens of each, H hidden, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from minillm.config.check import routes
from minillm.config.recipe import Recipe
from minillm.config.schema import RunConfig, StageConfig
from minillm.data.examples import read_records
from minillm.model.adapters import keep_base_in
from minillm.model.layers import layers_of
from minillm.model.load import cached, load_frozen, load_student, load_teacher, own_weights, skeleton
from minillm.model.quantised import held_bytes
from minillm_kernels.hidden.chunked import BUFFER_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pass(NamedTuple):
    """One pass of a model up to its final states."""

    work: int
    """Floating-point operations; a multiplication and an addition are two."""
    kept: int
    """Bytes kept: by autograd between forward and backward, or as keys and values while decoding."""


class _Whole(nn.Module):
    """A pass and what follows it in one forward, so that a backward with recomputation sees the same weights."""

    def __init__(self, base: nn.Module, then: Callable[[Any], int]) -> None:
        super().__init__()
        self.base, self.then = base, then

    def forward(self, **inputs: Any) -> int:
        return self.then(self.base(**inputs))


def trial(model: "PreTrainedModel", sequences: int, tokens: int, train: bool = False) -> Pass:
    """Count a pass over [B, T] tokens, some of them padding: forward with a cache; to train, forward and backward."""
    from transformers import DynamicCache

    kept: dict[int, torch.UntypedStorage] = {}
    cache = DynamicCache(config=model.config)

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    def then(result: Any) -> int:
        layers: list[Any] = [] if train else cache.layers
        for layer in layers:
            keep(layer.keys)
            keep(layer.values)
        bytes_kept = sum(storage.nbytes() for storage in kept.values())
        if train:
            result.last_hidden_state.sum().backward()
        return bytes_kept

    whole = _Whole(model.base_model, then)
    own = {name: (x.shape, x.dtype, x.requires_grad) for name, x in whole.named_parameters()}
    own |= {name: (x.shape, x.dtype, False) for name, x in whole.named_buffers()}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(train):
        state = {name: torch.empty(s, dtype=d).requires_grad_(grad) for name, (s, d, grad) in own.items()}
        weights = {x.untyped_storage()._cdata for x in state.values()}
        ids = torch.zeros(sequences, tokens, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= {"use_cache": False} if train else cached(model.base_model, cache)
        with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            bytes_kept = torch.func.functional_call(whole, state, kwargs=inputs)
        return Pass(flops.get_total_flops(), bytes_kept)


@dataclass
class Cost:
    """Of one stage: bytes by what they are for, of which `rollout` and `update` take turns; operations by phase."""

    held: dict[str, int]
    rollout: dict[str, int]
    update: dict[str, int]
    work: dict[str, float]
    tokens: int
    """Of prompts, answers and text that are trained on, at most."""

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + max(sum(self.rollout.values()), sum(self.update.values()))


def skeletons(run: RunConfig) -> "tuple[PreTrainedModel, list[PreTrainedModel]]":
    """Student and teachers without their weights, the largest teacher first; the student itself where it teaches."""
    with torch.device("meta"):
        loaded = load_teacher(run, load=skeleton)
        student = load_student(run, loaded, load=skeleton)
        teachers = [load_frozen(route.model, run, load=skeleton) for route in routes(run).values()]
    if loaded is not None or own_weights(run):
        teachers.append(loaded or student)
    if run.model.compute_dtype != "auto":
        keep_base_in(student, getattr(torch, run.model.compute_dtype))
    return student, sorted(teachers, key=lambda model: -model.num_parameters())


def cost(run: RunConfig, stage: StageConfig, processes: int = 1) -> Cost:
    """Count what one stage needs in each of so many processes, which share its batches; raises what loading its models
    would."""
    (student, teachers), own = skeletons(run), own_weights(run)
    teacher = teachers[0] if teachers else None
    method, steps, new = stage.method, stage.optim.steps, stage.rollout.longest
    samples = method in ("minillm", "seqkd", "gkd")
    answer = max(new * samples, stage.data.max_response_length * (method in ("sft", "kd", "gkd")))
    tokens, batch = stage.data.max_prompt_length + answer, -(-stage.optim.batch_size // processes)
    micro = min(stage.optim.micro_batch_size, batch)

    trained = sum(p.nbytes for p in student.parameters() if p.requires_grad)
    held = {"student": held_bytes(student, run.model.quantize), "gradients": trained}
    held["AdamW"] = _moments(student, stage.optim.optimizer)
    if own:
        held["teacher"] = trained * (own == "ema")
    elif teachers:
        name = "teachers" if len(teachers) > 1 else "teacher"
        held[name] = sum(held_bytes(model, run.teacher.quantize) for model in teachers)

    # ---- update: a micro-batch of answers or of text, whichever keeps more
    inputs = len(layers_of(student)[1]) * _state_bytes(student) if run.model.recompute else 0  # kept, of a token
    head, head_teacher = _head(student), _head(teacher) if teacher is not None else 0
    learnt = trial(student, micro, tokens, train=True)
    losses = BUFFER_BYTES if run.model.head == "fused" else 3 * micro * answer * _logit_bytes(student)
    update = {"activations": learnt.kept + micro * tokens * inputs, "losses": losses}
    heads = 3 * head * (2 if method in ("kd", "gkd") else 1)  # there labels go through the head by themselves
    heads += head_teacher if method in ("kd", "gkd", "minillm") else 0
    work = {"update": steps * batch * (learnt.work / micro + answer * heads)}
    if method in ("kd", "gkd") and teacher is not None:
        work["score"] = steps * batch * trial(teacher, 1, tokens).work
    seen = steps * batch * tokens
    if method == "minillm" and stage.objective.pt_weight > 0:
        size, length = -(-stage.objective.pt_batch_size // processes), stage.objective.pt_length
        micro = min(stage.optim.micro_batch_size, size)
        text, heads = trial(student, micro, length, train=True), 3 * head
        update["activations"] = max(update["activations"], text.kept + micro * length * inputs)
        if stage.objective.pt_teacher and teacher is not None:
            work["score"] = steps * size * trial(teacher, 1, length).work
            heads += 3 * head + head_teacher
        work["update"] += steps * size * (text.work / micro + length * heads)
        seen += steps * size * length

    # ---- rollout: caches of what decodes, final states kept
    rollout: dict[str, int] = {}
    if samples:
        at_once = batch if method == "gkd" else -(-stage.rollout.batch_size // processes)
        decoding = {"minillm": (student, teacher), "gkd": (student,), "seqkd": (teacher,)}[method]
        models = [model for model in decoding if model is not None]
        passes = [trial(model, at_once, stage.data.max_prompt_length + new) for model in models]
        of = ["" if model is student else " of the teacher" for model in models]
        rollout = {
            **{f"caches{whose}": done.kept for whose, done in zip(of, passes, strict=True)},
            "final states": at_once * new * sum(_state_bytes(model) for model in models),
            "logits": sum(at_once * _logit_bytes(model) for model in models),
        }
        for whose, done, model in zip(of, passes, models, strict=True):
            each = done.work + at_once * new * _head(model)
            work[f"rollout{whose}"] = _sequences(stage) / processes / at_once * each
        if method == "minillm" and teacher is not None:
            update["rollouts"] = stage.rollout.batch_size * new * _state_bytes(teacher)
    return Cost(held, rollout, update, work, seen)


def describe(recipe: Recipe) -> str:
    """The cost of all stages in words, and what the work takes where nothing but large matmuls is waited for."""
    lines = ["one process, at the longest prompts and answers; validation and evaluation come on top"]
    rate = matmul_rate(recipe.run.model.dtype)
    for name, stage in recipe.stages.items():
        found = cost(recipe.run, stage)
        work = sum(found.work.values())
        lines += [
            "",
            f"{name} ({stage.method}): {stage.optim.steps} steps, at most {found.tokens:,} tokens trained on",
            f"  held    {_gib(found.held)}",
            *([f"  rollout {_gib(found.rollout)}"] if found.rollout else []),
            f"  update  {_gib(found.update)}",
            f"  peak    {found.peak / 2**30:.2f} GiB",
            f"  work    {work / 1e12:,.1f} TFLOP: "
            + ", ".join(f"{phase} {value / work:.0%}" for phase, value in found.work.items()),
            f"          {work / rate / 60:.1f} min at the {rate / 1e12:.3g} TFLOP/s of a large matmul here",
        ]
    return "\n".join(lines)


def matmul_rate(dtype: str, size: int = 2048) -> float:
    """Operations per second of one large matmul in the student's dtype, the best of a few, on this machine."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


# ---- helpers


def _sequences(stage: StageConfig) -> float:
    """Sequences sampled over the stage."""
    if stage.method == "seqkd":
        return len(read_records(stage.data.train))
    if stage.method == "gkd":
        return stage.optim.steps * stage.optim.batch_size * stage.rollout.on_policy
    steps_of_one = stage.rollout.epochs * stage.rollout.batch_size // stage.optim.batch_size
    return -(-stage.optim.steps // steps_of_one) * stage.rollout.batch_size


def _moments(student: "PreTrainedModel", optimizer: str) -> int:
    """Bytes of AdamW's two moments, and of the remainders that Kahan summation carries."""
    trained = [p for p in student.parameters() if p.requires_grad]
    if "bit" in optimizer:
        return sum(p.numel() for p in trained) * (1 if "4bit" in optimizer else 2)
    return sum(p.nbytes for p in trained) * (3 if optimizer == "adamw_kahan" else 2)


def _head(model: "PreTrainedModel") -> int:
    """Operations of the vocabulary head for one token."""
    return 2 * model.get_output_embeddings().weight.numel()


def _state_bytes(model: "PreTrainedModel") -> int:
    """Bytes of one final state, or of what one layer hands to the next for one token."""
    return model.config.get_text_config().hidden_size * model.dtype.itemsize


def _logit_bytes(model: "PreTrainedModel") -> int:
    """Bytes of one row of logits."""
    return model.config.get_text_config().vocab_size * model.dtype.itemsize


def _gib(parts: dict[str, int]) -> str:
    total = sum(parts.values()) / 2**30
    return f"{total:.2f} GiB: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
