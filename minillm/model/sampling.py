"""Sampling from the teacher-student mixture, both models decoding side by side with their own key-value caches.

Every token is drawn by `minillm_kernels.mixed_sample`, whose log-probs are those of the law sampled; they are kept,
and so are the final hidden states that predicted each token. Hence nothing needs a second forward pass over what was
sampled: the teacher's distribution at any response position is its head applied to the state kept here. Where the
teacher has no part in the draw (alpha = 0) it does not decode: it reads each sample once, in one forward pass.

Legend: B sequences, P longest prompt, T longest response, H hidden.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from minillm.data.examples import collate
from minillm.model.head import CausalLM, common_vocabulary
from minillm_kernels import fused_linear_token_logprobs, mixed_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rollout(NamedTuple):
    """Responses and all that was known when they were sampled; entries beyond a response's length are 0."""

    prompts: list[list[int]]
    """B prompts, one per sequence."""
    token_ids: Tensor
    """[B, T] sampled tokens; the last one is end-of-sequence unless the limit was reached."""
    lengths: Tensor
    """[B] tokens sampled, end-of-sequence included."""
    student_logprobs: Tensor
    """[B, T] log q(y_t) of the student that sampled, in nats."""
    teacher_logprobs: Tensor | None
    """[B, T] log p(y_t); None without a teacher."""
    mixture_logprobs: Tensor
    """[B, T] log-probs of the mixture, the law sampled from."""
    from_teacher: Tensor
    """[B, T] bool, whether the teacher's side of the mixture drew the token."""
    student_hidden: Tensor | None
    """[B, T, H] student's final states, each predicting the token of its position; None where nobody needs them."""
    teacher_hidden: Tensor | None
    """[B, T, H] teacher's, likewise."""

    @property
    def mask(self) -> Tensor:
        """[B, T] bool, tokens that exist."""
        return torch.arange(self.token_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def responses(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self.token_ids.tolist(), self.lengths.tolist(), strict=True)]


@torch.no_grad()  # not inference_mode: the hidden states kept enter a graph later
def sample(
    student: CausalLM,
    teacher: CausalLM | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int,
    alpha: float = 0.2,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    samples_per_prompt: int = 1,
    uniforms: Tensor | None = None,
    vocab_size: int | None = None,
    row_length: int = 0,
) -> Rollout:
    """Continue each prompt by up to `max_new_tokens` tokens of α p + (1-α) q, stopping each at end-of-sequence.

    `uniforms` [max_new_tokens, B, 2] float64 makes the draw repeatable, token by token, for any pair of models (see
    `draw_uniforms`); temperature 0 is greedy. Samples of one prompt are neighbours and share its prefill. A teacher
    that only reads them has several in a row of `row_length` tokens, as in `collate`.
    """
    device = student.device
    if teacher is not None and vocab_size is None:
        vocab_size = common_vocabulary(student, teacher)
    beside = teacher
    if alpha == 0 and top_k == 0 and top_p == 1:  # no part in the draw, and its law of a token needs no filter
        beside = None
    ids, mask = _left_pad(prompts, device)
    models = [_Decoder(model, ids, mask, samples_per_prompt) for model in (student, beside) if model is not None]
    sampled_prompts = [list(prompt) for prompt in prompts for _ in range(samples_per_prompt)]
    running = torch.ones(len(sampled_prompts), dtype=torch.bool, device=device)
    lengths = torch.zeros(len(sampled_prompts), dtype=torch.long, device=device)
    steps, hidden = [], []
    for t in range(max_new_tokens):
        logits = [decoder.logits() for decoder in models]
        hidden.append([decoder.hidden for decoder in models])
        drawn = mixed_sample(
            logits[0],
            logits[1] if beside is not None else None,
            alpha,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            uniforms=None if uniforms is None else uniforms[t].to(device),
            vocab_size=vocab_size,
        )
        steps.append(drawn)
        lengths += running
        running = running & (drawn.token_ids != eos_token_id)
        if t + 1 == max_new_tokens or not running.any():
            break
        for decoder in models:
            decoder.append(drawn.token_ids)
    valid = torch.arange(len(steps), device=device) < lengths[:, None]

    def gather(name: str) -> Tensor:
        values = torch.stack([getattr(step, name) for step in steps], dim=1)
        return torch.where(valid, values, torch.zeros_like(values))

    states = [torch.stack(states, dim=1) for states in zip(*hidden, strict=True)]
    rollout = Rollout(
        prompts=sampled_prompts,
        token_ids=gather("token_ids"),
        lengths=lengths,
        student_logprobs=gather("student_logprobs"),
        teacher_logprobs=gather("teacher_logprobs") if beside is not None else None,
        mixture_logprobs=gather("mixture_logprobs"),
        from_teacher=gather("from_teacher"),
        student_hidden=states[0],
        teacher_hidden=states[1] if beside is not None else None,
    )
    if teacher is None or beside is not None:
        return rollout
    return _scored(rollout, teacher, temperature or 1.0, vocab_size, row_length)


def _scored(
    rollout: Rollout, teacher: CausalLM, temperature: float, vocab_size: int | None, row_length: int
) -> Rollout:
    """With the teacher's side of samples that it had no part in."""
    hidden, logprobs = [], []
    responses, at_once = rollout.responses(), 16  # sequences of a forward pass
    for start in range(0, len(responses), at_once):
        rows = slice(start, start + at_once)
        batch = collate(rollout.prompts[rows], responses[rows], row_length).to(teacher.device)
        output = teacher.output(batch)
        hidden.append(output.states)
        logprobs.append(
            fused_linear_token_logprobs(*output, batch.targets, temperature=temperature, vocab_size=vocab_size)
        )
    mask, states, known = rollout.mask, torch.cat(hidden), torch.cat(logprobs)
    teacher_hidden = states.new_zeros(*mask.shape, states.shape[1])
    teacher_hidden[mask] = states
    teacher_logprobs = torch.zeros_like(rollout.student_logprobs)
    teacher_logprobs[mask] = known.to(teacher_logprobs.dtype)
    return rollout._replace(teacher_hidden=teacher_hidden, teacher_logprobs=teacher_logprobs)


def gather(rollout: Rollout, accelerator: Accelerator) -> Rollout:
    """The samples of all processes, known to each: row i of process r becomes row i · processes + r."""
    if accelerator.num_processes == 1:
        return rollout

    def joined(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if values.dim() > 1:
            values = accelerator.pad_across_processes(values, dim=1)
        everyone = accelerator.gather(values.contiguous())
        return everyone.unflatten(0, (accelerator.num_processes, -1)).transpose(0, 1).flatten(0, 1).contiguous()

    shares = gather_object([rollout.prompts])
    prompts = [prompt for row in zip(*shares, strict=True) for prompt in row]
    tensors: dict[str, Any] = {name: joined(value) for name, value in rollout._asdict().items() if name != "prompts"}
    return Rollout(prompts=prompts, **tensors)


def draw_uniforms(seed: int, max_new_tokens: int, sequences: int) -> Tensor:
    """Uniforms [max_new_tokens, sequences, 2] that depend on the seed and the shape alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(max_new_tokens, sequences, 2, dtype=torch.float64, generator=generator)


class _Decoder:
    """One model with its cache, and the final hidden state [B, H] of its last token."""

    def __init__(self, model: CausalLM, ids: Tensor, mask: Tensor, copies: int) -> None:
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache(config=model.model.config)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        hidden = model.states(ids, mask, self.cache, position_ids=positions)
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)
        self.hidden = hidden[:, -1].repeat_interleave(copies, dim=0)
        self.mask = mask.repeat_interleave(copies, dim=0)
        self.position = self.mask.sum(dim=1, keepdim=True)  # of the next token

    def logits(self) -> Tensor:
        return self.model.logits(self.hidden)

    def append(self, token_ids: Tensor) -> None:
        """Feed one token per sequence. Sequences that have ended go on decoding; what follows is never read."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.hidden = self.model.states(token_ids[:, None], self.mask, self.cache, position_ids=self.position)[:, -1]
        self.position = self.position + 1


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def greedy_answers(
    model: CausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """The most likely token at every step, decoded without special tokens."""
    return decode(tokenizer, greedy(model, prompts, max_new_tokens, batch_size, tokenizer.eos_token_id))


def greedy(
    model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, eos_token_id: int
) -> list[list[int]]:
    """The same as token ids, end-of-sequence included where it was reached."""
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        answers += sample(
            model,
            None,
            prompts[start : start + batch_size],
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            alpha=0.0,
            temperature=0.0,
        ).responses()
    return answers


def decode(tokenizer: "PreTrainedTokenizerBase", token_ids: list[list[int]]) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(token_ids, skip_special_tokens=True)]
