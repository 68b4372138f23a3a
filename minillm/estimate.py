"""What a run will need, before anything is loaded: the memory and the work of each stage, in one process.

The models are built without weights and run once on tensors without storage, at the longest sequences that the limits
of `data` and `rollout` allow: what autograd saves, what the caches hold and the floating-point operations are counted
op by op in the model's own code. Not counted: what the allocator, the libraries and temporaries take, and validation.

Legend: B sequences, T tokens of each, H hidden, V vocabulary.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from minillm.config import Config
from minillm.data import read_records
from minillm.models import load_student, skeleton
from minillm.recipe import Recipe
from minillm_kernels.chunked import BUFFER_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pass(NamedTuple):
    """One pass of a model up to its final states."""

    forward: int
    """Floating-point operations; a multiplication and an addition are two."""
    backward: int
    saved: int
    """Bytes kept between the two."""
    cache: int
    """Bytes of the keys and values, while decoding."""


def trial(model: "PreTrainedModel", sequences: int, tokens: int) -> Pass:
    """Count a pass over [B, T] tokens, some of them padding; forward and, where weights are trained, backward."""
    base, own = model.base_model, {}
    for name, x in [*base.named_parameters(), *base.named_buffers()]:
        own[name] = (x.shape, x.dtype, x.requires_grad)
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {name: torch.empty(s, dtype=d).requires_grad_(grad) for name, (s, d, grad) in own.items()}
        weights = {x.untyped_storage()._cdata for x in state.values()}
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage()._cdata not in weights:
                saved[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        def run(cached: bool) -> tuple[torch.Tensor, int, int]:
            ids = torch.zeros(sequences, tokens, dtype=torch.long)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": cached}
            with FlopCounterMode(display=False) as flops:
                result = torch.func.functional_call(base, state, kwargs=inputs)
            layers = result.past_key_values.layers if cached else []
            cache = sum(x.untyped_storage().nbytes() for layer in layers for x in (layer.keys, layer.values))
            return result.last_hidden_state, flops.get_total_flops(), cache

        with torch.no_grad():
            cache = run(cached=True)[2]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            states, forward, _ = run(cached=False)
        backward = 0
        if states.requires_grad:
            with FlopCounterMode(display=False) as flops:
                states.sum().backward()
            backward = flops.get_total_flops()
        return Pass(forward, backward, sum(storage.nbytes() for storage in saved.values()), cache)


@dataclass
class Estimate:
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


def estimate(config: Config) -> Estimate:
    """Count what one stage needs; raises what loading its models would."""
    with torch.device("meta"):
        teacher = (
            skeleton(config.model.teacher, config.model.dtype, config.model.attn) if config.model.teacher else None
        )
        student = load_student(config, teacher, load=skeleton)
    method, steps, new = config.method, config.optim.steps, config.rollout.max_new_tokens
    samples = method in ("minillm", "seqkd", "gkd")
    answer = max(new * samples, config.data.max_response_length * (method in ("sft", "kd", "gkd")))
    tokens, batch = config.data.max_prompt_length + answer, config.optim.batch_size
    micro = min(config.optim.micro_batch_size, batch)

    trained = sum(p.nbytes for p in student.parameters() if p.requires_grad)
    held = {"student": _weights(student), "gradients": trained, "AdamW": 2 * trained}
    if teacher is not None:
        held["teacher"] = _weights(teacher)

    # ---- update: a micro-batch of answers or of text, whichever keeps more
    learnt = trial(student, micro, tokens)
    losses = BUFFER_BYTES if config.model.head == "fused" else 3 * micro * answer * _logit_bytes(student)
    update = {"activations": learnt.saved, "losses": losses}
    per_token = (learnt.forward + learnt.backward) / (micro * tokens)
    head, head_teacher = _head(student), _head(teacher) if teacher is not None else 0
    work = {"update": steps * batch * (tokens * per_token + answer * 3 * head)}
    seen = steps * batch * tokens
    if method in ("kd", "gkd", "minillm"):
        work["update"] += steps * batch * answer * head_teacher
    if method in ("kd", "gkd") and teacher is not None:
        work["score"] = steps * batch * trial(teacher, 1, tokens).forward
    if method == "minillm" and config.objective.pt_weight > 0:
        size, length = config.objective.pt_batch_size, config.objective.pt_length
        text = trial(student, min(config.optim.micro_batch_size, size), length)
        update["activations"] = max(update["activations"], text.saved)
        work["update"] += steps * size * length * (per_token + 3 * head)
        seen += steps * size * length

    # ---- rollout: caches of what decodes, final states kept
    rollout: dict[str, int] = {}
    if samples:
        at_once = batch if method == "gkd" else config.rollout.batch_size
        decoding = {"minillm": (student, teacher), "gkd": (student,), "seqkd": (teacher,)}[method]
        models = [model for model in decoding if model is not None]
        passes = [trial(model, at_once, config.data.max_prompt_length + new) for model in models]
        states = (
            at_once * new * sum(model.config.get_text_config().hidden_size * model.dtype.itemsize for model in models)
        )
        rollout = {
            "caches": sum(done.cache for done in passes),
            "final states": states,
            "logits": sum(at_once * _logit_bytes(model) for model in models),
        }
        work["rollout"] = (
            _sequences(config)
            / at_once
            * sum(done.forward + at_once * new * _head(model) for done, model in zip(passes, models, strict=True))
        )
        if method == "minillm" and teacher is not None:
            hidden = teacher.config.get_text_config().hidden_size * teacher.dtype.itemsize
            update["rollouts"] = config.rollout.batch_size * new * hidden
    return Estimate(held, rollout, update, work, seen)


def describe(recipe: Recipe) -> str:
    """Estimates of all stages in words, and what the work takes where nothing but large matmuls is waited for."""
    lines = ["one process, at the longest prompts and answers; validation and evaluation come on top"]
    rate = matmul_rate(recipe.first)
    for name, config in recipe.stages.items():
        found = estimate(config)
        work = sum(found.work.values())
        lines += [
            "",
            f"{name} ({config.method}): {config.optim.steps} steps, at most {found.tokens:,} tokens trained on",
            f"  held    {_gib(found.held)}",
            *([f"  rollout {_gib(found.rollout)}"] if found.rollout else []),
            f"  update  {_gib(found.update)}",
            f"  peak    {found.peak / 2**30:.2f} GiB",
            f"  work    {work / 1e12:,.1f} TFLOP: "
            + ", ".join(f"{phase} {value / work:.0%}" for phase, value in found.work.items()),
            f"          {work / rate / 60:.1f} min at the {rate / 1e12:.3g} TFLOP/s of a large matmul here",
        ]
    return "\n".join(lines)


def matmul_rate(config: Config, size: int = 2048) -> float:
    """Operations per second of one large matmul in the models' dtype, the best of a few, on this machine."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    a = torch.randn(size, size, device=device).to(getattr(torch, config.model.dtype))
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


# ---- helpers


def _sequences(config: Config) -> float:
    """Sequences sampled over the stage."""
    if config.method == "seqkd":
        return len(read_records(config.data.train))
    if config.method == "gkd":
        return config.optim.steps * config.optim.batch_size * config.rollout.on_policy
    steps_of_one = config.rollout.epochs * config.rollout.batch_size // config.optim.batch_size
    return -(-config.optim.steps // steps_of_one) * config.rollout.batch_size


def _weights(model: nn.Module) -> int:
    return sum(x.nbytes for x in model.parameters())


def _head(model: "PreTrainedModel") -> int:
    """Operations of the vocabulary head for one token."""
    return 2 * model.get_output_embeddings().weight.numel()


def _logit_bytes(model: "PreTrainedModel") -> int:
    """Bytes of one row of logits."""
    return model.config.get_text_config().vocab_size * model.dtype.itemsize


def _gib(parts: dict[str, int]) -> str:
    total = sum(parts.values()) / 2**30
    return f"{total:.2f} GiB: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
