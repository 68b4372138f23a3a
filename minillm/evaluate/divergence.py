"""Reverse KL of the student to the teacher, exact over the vocabulary at every position.

Legend: P prompts, B sequences, T positions, N tokens, H hidden.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minillm.config import Eval
from minillm.data import Example, collate
from minillm.evaluate.estimate import Estimate
from minillm.models import common_vocabulary, head, last_hidden
from minillm.rollout import draw_uniforms, sample
from minillm_kernels import distill_stats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 512  # logits of both models at once: 2 × 512 × 49152 fp32 are 200 MB


def own_samples(
    student: "PreTrainedModel", teacher: "PreTrainedModel", examples: list[Example], settings: Eval, eos_token_id: int
) -> Estimate:
    """Nats per token along the student's own samples: the objective that MiniLLM minimises.

    The uniforms depend on the settings alone, so that two students, or one before and after training, are compared on
    paired draws.
    """
    uniforms = draw_uniforms(settings.seed, settings.max_new_tokens, len(examples) * settings.samples)
    prompts_at_once = max(1, settings.batch_size // settings.samples)
    totals, counts = [], []
    for start in range(0, len(examples), prompts_at_once):
        part = examples[start : start + prompts_at_once]
        first = start * settings.samples
        rollout = sample(
            student,
            teacher,
            [example.prompt for example in part],
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=eos_token_id,
            alpha=0.0,
            temperature=settings.temperature,
            samples_per_prompt=settings.samples,
            uniforms=uniforms[:, first : first + len(part) * settings.samples],
            vocab_size=common_vocabulary(student, teacher),
        )
        assert rollout.teacher_hidden is not None
        mask = rollout.mask
        kl = reverse_kl(
            student, teacher, rollout.student_hidden[mask], rollout.teacher_hidden[mask], rollout.token_ids[mask]
        )
        lengths = rollout.lengths.view(len(part), settings.samples).sum(1)
        totals += [piece.sum() for piece in kl.split(lengths.tolist())]
        counts += lengths.tolist()
    return Estimate(torch.stack(totals).double().cpu(), torch.tensor(counts, dtype=torch.float64))


@torch.no_grad()
def references(
    student: "PreTrainedModel", teacher: "PreTrainedModel", examples: list[Example], settings: Eval
) -> Estimate:
    """Nats per token along the reference answers, where both models read somebody else's text."""
    totals = []
    size = max(1, settings.batch_size // 4)  # whole sequences: several times longer than a decoding step
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        batch = collate([e.prompt for e in part], [e.response for e in part]).to(student.device)
        states = [last_hidden(m, batch.input_ids, batch.attention_mask)[batch.predict] for m in (student, teacher)]
        kl = reverse_kl(student, teacher, states[0], states[1], batch.targets)
        totals += [piece.sum() for piece in kl.split([len(e.response) for e in part])]
    counts = torch.tensor([len(e.response) for e in examples], dtype=torch.float64)
    return Estimate(torch.stack(totals).double().cpu(), counts)


@torch.no_grad()
def reverse_kl(
    student: "PreTrainedModel",
    teacher: "PreTrainedModel",
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    token_ids: Tensor,
) -> Tensor:
    """[N] KL(q‖p) in nats from final hidden states [N, H], in blocks of rows that bound the memory."""
    vocab_size = common_vocabulary(student, teacher)
    blocks = []
    for h_s, h_t, ids in zip(
        student_hidden.split(ROWS), teacher_hidden.split(ROWS), token_ids.split(ROWS), strict=True
    ):
        blocks.append(distill_stats(head(student, h_s), head(teacher, h_t), ids, vocab_size=vocab_size).reverse_kl)
    return torch.cat(blocks)
