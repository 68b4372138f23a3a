"""Reverse KL of the student to the teacher, exact over the vocabulary at every position.

Legend: P prompts, B sequences, T positions, N tokens, H hidden.
"""

import torch

from minillm.config import Eval
from minillm.data import Example, collate
from minillm.evaluate.estimate import Estimate
from minillm.rollout import draw_uniforms, sample
from minillm.vocabulary import CausalLM, Output, common_vocabulary, distill_stats


@torch.no_grad()
def own_samples(
    student: CausalLM, teacher: CausalLM, examples: list[Example], settings: Eval, eos_token_id: int
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
        outputs = (
            Output(rollout.student_hidden[mask], student.head),
            Output(rollout.teacher_hidden[mask], teacher.head),
        )
        kl = distill_stats(
            *outputs, rollout.token_ids[mask], vocab_size=common_vocabulary(student, teacher)
        ).reverse_kl
        lengths = rollout.lengths.view(len(part), settings.samples).sum(1)
        totals += [piece.sum() for piece in kl.split(lengths.tolist())]
        counts += lengths.tolist()
    return Estimate(torch.stack(totals).double().cpu(), torch.tensor(counts, dtype=torch.float64))


@torch.no_grad()
def references(student: CausalLM, teacher: CausalLM, examples: list[Example], settings: Eval) -> Estimate:
    """Nats per token along the reference answers, where both models read somebody else's text."""
    totals = []
    size = max(1, settings.batch_size // 4)  # whole sequences: several times longer than a decoding step
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        batch = collate([e.prompt for e in part], [e.response for e in part]).to(student.device)
        outputs = student.output(batch), teacher.output(batch)
        kl = distill_stats(*outputs, batch.targets, vocab_size=common_vocabulary(student, teacher)).reverse_kl
        totals += [piece.sum() for piece in kl.split([len(e.response) for e in part])]
    counts = torch.tensor([len(e.response) for e in examples], dtype=torch.float64)
    return Estimate(torch.stack(totals).double().cpu(), counts)
