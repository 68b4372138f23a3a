"""How far two models are apart: along responses that one of them samples, and along reference responses.

Exact over the vocabulary at every position, by the kernels that training uses. Where a model samples, it decodes and
the other one reads what it drew: the divergences come from the states that both passes leave. An author on a server
decodes there, and is asked about the states of its own text afterwards.

Legend: P prompts, S samples of each, B = P·S sequences (those of one prompt are neighbours), T positions, N tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.config.schema import EvalConfig
from minillm.data.examples import Example, collate
from minillm.engine import Engine
from minillm.engine.pair import Draw, draw_everywhere
from minillm.engine.responses import Response
from minillm.engine.rollout import drawn, read
from minillm.evaluation.means import Mean
from minillm.evaluation.share import a_share, over_batches
from minillm.model.head import CausalLM, Output, Scorer, common_vocabulary
from minillm.model.rollout import Rollout
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.model.split import split_alike
from minillm.teacher.served import ServedTeacher
from minillm_kernels import fused_linear_distill_stats

Author = CausalLM | ServedTeacher
"""What can sample, here or on a server."""


class Samples(NamedTuple):
    """B sequences; divergences in nats, exact over the vocabulary, [B, T] float64 on the CPU, 0 beyond the end."""

    token_ids: list[list[int]]
    lengths: Tensor
    """[B] tokens, end-of-sequence included."""
    per_prompt: int
    to_other: Tensor
    """KL(author‖other) of the next-token laws; all 0 where there is no other model."""
    from_other: Tensor
    """KL(other‖author)."""

    def per_token(self, values: Tensor) -> Mean:
        """The mean of values [B, T] over all tokens."""
        by_prompt = (-1, self.per_prompt)
        return Mean.of(values.sum(1).view(by_prompt).sum(1), self.lengths.double().view(by_prompt).sum(1))


@torch.no_grad()
def draw(
    author: Author,
    other: Scorer | None,
    examples: Sequence[Example],
    settings: EvalConfig,
    ends: Sequence[int],
    engine: Engine | None = None,
) -> Samples:
    """`eval.samples` responses of `author`, or of the `engine` of one that is here, to each prompt, at
    eval.temperature, from the whole vocabulary.

    Sample number s of every prompt draws from the uniforms of seed eval.seed + s, whatever the model and the batch:
    two students, or one before and after training, are compared on paired draws.
    """
    seeds = range(settings.seed, settings.seed + settings.samples)
    uniforms = torch.stack([draw_uniforms(seed, settings.sample_tokens, len(examples)) for seed in seeds], dim=2)
    vocab_size = common_vocabulary(author, *([] if other is None else [other]))
    decoding = Decoding(settings.sample_tokens, ends, settings.temperature, chunk_size=settings.batch_size)
    copies, size = settings.samples, max(1, settings.batch_size // settings.samples)
    if other is None and isinstance(author, CausalLM):  # else the states of all that is sampled at once are kept
        size = a_share(examples, size)
    responses: list[Response] = []
    if engine is not None:
        assert isinstance(author, CausalLM)
        prompts = [example.prompt for example in examples for _ in range(copies)]
        how = Draw(author, None, 0.0, decoding, vocab_size)
        responses = draw_everywhere(how, engine, prompts, uniforms.flatten(1, 2))

    def rolled_out(lm: CausalLM, start: int, part: Sequence[Example]) -> Rollout:
        if engine is not None:
            rollout = drawn(responses[start * copies : (start + len(part)) * copies], lm.device)
            if other is None:
                return rollout
            temperature = settings.temperature
            return read(rollout, lm, other, 0.0, temperature=temperature, vocab_size=vocab_size, student_states=True)
        return sample(
            lm,
            other,
            [example.prompt for example in part],
            decoding,
            alpha=0.0,
            samples_per_prompt=copies,
            uniforms=uniforms[:, start : start + len(part)].flatten(1, 2),
            vocab_size=vocab_size,
            student_states=other is not None,
        )

    def written(start: int, part: Sequence[Example]) -> tuple[list[list[int]], list[Output]]:
        """The responses to a part of the examples, and what both models say of their tokens, one after the other."""
        if isinstance(author, CausalLM):
            rollout = rolled_out(author, start, part)
            if other is None:
                return rollout.responses(), []
            assert rollout.student_hidden is not None and rollout.teacher_hidden is not None
            states = rollout.student_hidden[rollout.mask], rollout.teacher_hidden[rollout.mask]
            return rollout.responses(), [Output(states[0], author.head), Output(states[1], other.head)]
        prompts = [example.prompt for example in part for _ in range(copies)]
        mine = uniforms[:, start : start + len(part)].flatten(1, 2)
        token_ids = author.sample(prompts, decoding, mine, vocab_size)
        if other is None:
            return token_ids, []
        batch = collate(prompts, token_ids).to(other.device)
        return token_ids, [author.output(batch), other.output(batch)]

    def measured(start: int, part: Sequence[Example]) -> Samples:
        token_ids, outputs = written(start, part)
        lengths = torch.tensor([len(tokens) for tokens in token_ids])
        tables = torch.zeros(2, len(token_ids), settings.sample_tokens, dtype=torch.float64)
        if outputs:
            tokens = torch.tensor([token for response in token_ids for token in response]).to(outputs[0].states.device)
            stats = fused_linear_distill_stats(*split_alike(*outputs[0], *outputs[1]), tokens, vocab_size=vocab_size)
            mask = torch.arange(settings.sample_tokens) < lengths[:, None]
            for table, values in zip(tables, (stats.reverse_kl, stats.forward_kl), strict=True):
                table[mask] = values.double().cpu()
        return Samples(token_ids, lengths, copies, *tables)

    found = over_batches(measured, examples, size, author, other)
    return Samples(
        [tokens for part in found for tokens in part.token_ids],
        torch.cat([part.lengths for part in found]),
        settings.samples,
        torch.cat([part.to_other for part in found]),
        torch.cat([part.from_other for part in found]),
    )


@torch.no_grad()
def references(
    student: Scorer, teacher: Scorer, examples: Sequence[Example], settings: EvalConfig
) -> tuple[Mean, Mean]:
    """Reverse and forward KL, nats per token, along the references."""
    vocab_size = common_vocabulary(student, teacher)

    def sums(start: int, part: Sequence[Example]) -> Tensor:
        batch = collate([e.prompt for e in part], [e.response for e in part]).to(student.device)
        models = (*student.output(batch), *teacher.output(batch))
        stats = fused_linear_distill_stats(*split_alike(*models), batch.targets, vocab_size=vocab_size)
        lengths = [len(e.response) for e in part]
        return torch.stack([by_sequence(values, lengths) for values in (stats.reverse_kl, stats.forward_kl)])

    size = max(1, settings.batch_size // 4)  # whole sequences: several times longer than a decoding step
    reverse, forward = torch.cat(over_batches(sums, examples, size, student, teacher), dim=1)
    counts = torch.tensor([len(e.response) for e in examples], dtype=torch.float64)
    return Mean.of(reverse, counts), Mean.of(forward, counts)


def by_sequence(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """[B] float64 on the CPU, the sums of [N] values over the tokens of each sequence."""
    return torch.stack([piece.sum() for piece in values.split(list(lengths))]).double().cpu()
