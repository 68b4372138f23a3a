"""What a teacher says of given data, written to a directory: `minillm teach MODEL --data D --out DIR`.

    teacher.json           what is written, and in which shards: the plan, there from the start
    shard-00000.safetensors …   sequences and what the teacher says of them
    head.safetensors       its vocabulary head, of hidden states
    index.json             checksums of the shards and what was measured: there once all is whole

A shard holds, of n sequences with L tokens and N positions whose next token counts: `ids` [L], `starts` [n + 1] in
them, `positions` [N] in their sequences, `rows` [n + 1] in these; and `states` [N, H] (with `scale` [N, 1] in float8),
or `tokens` [N, k], `logprobs` [N, k] and `tail` [N]. Shards appear whole or not at all, so that a run that was stopped
or killed goes on with the first that is missing.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillm.config.schema import ConfigError
from minillm.config.teacher import STORE
from minillm.data.examples import Batch, Example
from minillm.files import checksum, flush, remove_partials, whole_or_absent, write_atomically
from minillm.model.head import CausalLM, Output, common_vocabulary
from minillm.teacher.top_k import TopK, top_k_divergence
from minillm.teacher.wire import DTYPES, FLOAT8, Question, digest, fingerprint, scaled_to_float8, tokenizer_fingerprint
from minillm.teacher.worker import answer
from minillm.terminal import say
from minillm_kernels import fused_linear_distill_stats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX, HEAD, SHARD = "index.json", "head.safetensors", "shard-{:05d}.safetensors"
STATES = {**DTYPES, "float8": FLOAT8}
MEASURED = 16
"""Sequences that are measured exactly, too."""


@dataclass(frozen=True)
class Plan:
    """What a directory holds: what `teacher.json` says."""

    kind: str
    """`hidden` or `top_k`."""
    states: str
    """In which type hidden states are kept."""
    k: int
    temperature: float
    """At which the top tokens' log-probs were taken."""
    model: str
    fingerprint: str
    dtype: str
    vocab_size: int
    hidden_size: int
    softcap: float | None
    scale: float
    ends: list[int]
    tokenizer: dict[str, Any]
    data: str
    data_digest: str
    tokens: int
    """Of all sequences."""
    rows: int
    """Tokens that are learnt from."""
    shards: list[tuple[int, int]] = field(default_factory=list)
    """The first sequence of each, and the one after its last."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a token that is learnt from."""
        if self.kind == "top_k":
            return 8 * self.k + 4 + 4
        return self.hidden_size * STATES[self.states].itemsize + 4 * (self.states == "float8") + 4

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return self.rows * self.row_bytes + 4 * self.tokens


def plan_of(
    lm: CausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    names: tuple[str, str],
    *,
    k: int = 0,
    temperature: float = 1.0,
    states: str = "auto",
    shard_bytes: int = 1 << 28,
) -> Plan:
    """How the answers of a model about examples are to be kept.

    Args:
        lm, tokenizer: the teacher.
        examples: prompts with responses.
        names: of the model and of the data.
        k: how many of its most likely tokens are kept of each law; 0: hidden states, from which all follow.
        temperature: at which the laws are taken.
        states: the type of hidden states: `auto`, the model's own, or one of STATES.
        shard_bytes: about as much goes into a file.

    Raises ConfigError for a k that leaves nothing out.
    """
    if k >= lm.vocab_size:
        raise ConfigError(f"--top-k is {k}, and the vocabulary {lm.vocab_size}: leave it out, which keeps all")
    batches = [Batch.of([example]) for example in examples]
    with torch.no_grad():
        head = lm.head
    generation = lm.model.generation_config
    ends = generation.eos_token_id if generation is not None else None
    dtype = str(lm.model.dtype).removeprefix("torch.")
    plan = Plan(
        kind="top_k" if k else "hidden",
        states=dtype if states == "auto" else states,
        k=k,
        temperature=temperature,
        model=names[0],
        fingerprint=fingerprint(lm),
        dtype=dtype,
        vocab_size=lm.vocab_size,
        hidden_size=head.weight.shape[1] if head.weight is not None else 0,
        softcap=head.softcap,
        scale=head.scale,
        ends=ends if isinstance(ends, list) else [] if ends is None else [ends],
        tokenizer=tokenizer_fingerprint(tokenizer),
        data=names[1],
        data_digest=digest(*(part.numpy().tobytes() for b in batches for part in (b.input_ids, b.positions))),
        tokens=sum(batch.input_ids.numel() for batch in batches),
        rows=sum(len(batch.targets) for batch in batches),
    )
    first, size = 0, 0
    for i, batch in enumerate(batches, 1):
        size += len(batch.targets) * plan.row_bytes + 4 * batch.input_ids.numel()
        if size >= shard_bytes or i == len(batches):
            plan.shards.append((first, i))
            first, size = i, 0
    return plan


def write_store(
    folder: Path,
    plan: Plan,
    lm: CausalLM,
    examples: Sequence[Example],
    max_tokens: int,
    student: CausalLM | None = None,
) -> dict[str, Any]:
    """Write what is missing of a directory, and return what `index.json` then holds.

    Raises ConfigError where the directory holds something else, or the disk has no room.
    """
    found = read_plan(folder) if (folder / STORE).exists() else None
    if found is not None and found != plan:
        raise ConfigError(
            f"{folder} holds what {found.model} says of {found.data}, or in another form: name another --out"
        )
    if found is None and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and no directory of `minillm teach`: name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    missing = [i for i in range(len(plan.shards)) if not (folder / SHARD.format(i)).exists()]
    _check_room(folder, plan, len(missing))
    write_atomically(folder / STORE, json.dumps(asdict(plan), indent=1))
    if plan.kind == "hidden" and not (folder / HEAD).exists():
        with torch.no_grad():
            parts = {"weight": lm.head.weight, "bias": lm.head.bias}
        _write(folder / HEAD, {name: value for name, value in parts.items() if value is not None})
    if len(missing) < len(plan.shards):
        say(f"{folder}: {len(plan.shards) - len(missing)} of {len(plan.shards)} shards are there already")
    for number, i in enumerate(missing, 1):
        _write(folder / SHARD.format(i), _shard(plan, lm, examples[slice(*plan.shards[i])], max_tokens))
        say(f"shard {number}/{len(missing)}")
    files = [folder / SHARD.format(i) for i in range(len(plan.shards))]
    index: dict[str, Any] = {"crc32": [checksum(path) for path in files]}
    if plan.kind == "top_k":
        index["measured"] = _measured(plan, lm, examples[:MEASURED], student)
        tails = torch.cat([load_file(path)["tail"] for path in files]).exp()
        index["tail_mass"] = {"mean": float(tails.mean()), "largest": float(tails.max())}
    write_atomically(folder / INDEX, json.dumps(index, indent=1))
    return index


def read_plan(folder: Path) -> Plan:
    """Raises ConfigError for a file that is none."""
    try:
        tree = json.loads((folder / STORE).read_text(encoding="utf-8"))
        tree["shards"] = [(int(first), int(last)) for first, last in tree["shards"]]
        return Plan(**tree)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / STORE} is damaged ({error}): write the directory again") from error


def _check_room(folder: Path, plan: Plan, missing: int) -> None:
    needed, free = plan.bytes * missing // len(plan.shards), shutil.disk_usage(folder).free
    say(
        f"{plan.rows:,} tokens to learn from, {plan.row_bytes:,} bytes each: {plan.bytes / 2**30:.2f} GiB in "
        f"{len(plan.shards)} shards; {free / 2**30:.1f} GiB free"
    )
    if needed > free:
        raise ConfigError(
            f"{folder} needs {needed / 2**30:.1f} GiB more and has {free / 2**30:.1f} GiB: make room, keep fewer "
            "(--top-k, --states float8), or serve the teacher"
        )


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with whole_or_absent(path) as partial:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial)
        flush(partial)


@torch.no_grad()
def _shard(plan: Plan, lm: CausalLM, examples: Sequence[Example], max_tokens: int) -> dict[str, Tensor]:
    questions = [Question.of(Batch.of([example])) for example in examples]

    def offsets(counts: list[int]) -> Tensor:
        return torch.tensor([0, *counts]).cumsum(0)

    tensors = {
        "ids": torch.cat([question.ids for question in questions]),
        "starts": offsets([len(question.ids) for question in questions]),
        "positions": torch.cat([question.positions for question in questions]).int(),
        "rows": offsets([len(question.positions) for question in questions]),
    }
    parts: list[dict[str, Tensor]] = []
    for states in _in_passes(lm, questions, max_tokens):
        if plan.kind == "top_k":
            logits = lm.logits(states.to(lm.device)) / plan.temperature
            law = TopK.of(logits, plan.k)
            parts.append({"tokens": law.token_ids.int().cpu(), "logprobs": law.logprobs.cpu(), "tail": law.tail.cpu()})
        elif plan.states == "float8":
            parts.append(scaled_to_float8(states))
        else:
            parts.append({"states": states.to(STATES[plan.states])})
    return tensors | {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _in_passes(lm: CausalLM, questions: Sequence[Question], max_tokens: int) -> Iterator[Tensor]:
    """The states that questions ask for, of about `max_tokens` tokens at once."""
    together: list[Question] = []
    for question in questions:
        if together and sum(len(each.ids) for each in (*together, question)) > max_tokens:
            yield torch.cat(answer(lm, together, max_tokens))
            together = []
        together.append(question)
    yield torch.cat(answer(lm, together, max_tokens))


@torch.no_grad()
def _measured(plan: Plan, lm: CausalLM, examples: Sequence[Example], student: CausalLM | None) -> dict[str, float]:
    """What the top tokens leave out, in nats a token of a few examples: the entropy of the teacher's law and of what
    is kept of it; with a student, both KL divergences over the vocabulary and over what is kept."""
    found: dict[str, float] = {}
    tokens = 0
    for example in examples:
        batch = Batch.of([example]).to(lm.device)
        states, head = lm.output(batch)
        tokens += len(batch.targets)
        teacher = lm.logits(states).float() / plan.temperature
        law = TopK.of(teacher, plan.k)
        entropies = {"entropy": teacher.log_softmax(-1), "entropy/top_k": law.outcomes()}
        now = {name: -(logs.exp() * logs.clamp(min=-1e4)).sum() for name, logs in entropies.items()}
        if student is not None:
            output, columns = student.output(batch), common_vocabulary(student, lm)
            options: dict[str, Any] = {"temperature": plan.temperature, "vocab_size": columns}
            exact = fused_linear_distill_stats(*output, states, head, batch.targets, **options)
            for name in ("forward_kl", "reverse_kl"):
                now[name] = getattr(exact, name).sum()
                now[f"{name}/top_k"] = top_k_divergence(Output(*output), law, name, **options)
        for name, value in now.items():
            found[name] = found.get(name, 0.0) + float(value)
    return {name: value / max(1, tokens) for name, value in found.items()} | {"tokens": float(tokens)}
