"""How far the student is from the teacher: on its own text, on the teacher's, and where both read somebody else's.

Exact over the vocabulary at every position, by the losses of training. Legend: P prompts, N tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.config.schema import EvalConfig
from minillm.data.examples import Example, collate
from minillm.evaluate.means import Estimate
from minillm.evaluate.samples import draw
from minillm.model.head import CausalLM, common_vocabulary
from minillm_kernels import fused_linear_distill_stats


def own_samples(
    student: CausalLM, teacher: CausalLM, examples: Sequence[Example], settings: EvalConfig, eos_token_id: int
) -> Estimate:
    """Reverse KL, nats per token, along the student's own samples: the objective that MiniLLM minimises."""
    samples = draw(student, teacher, examples, settings, eos_token_id)
    return samples.mean(samples.to_other)


@torch.no_grad()
def references(
    student: CausalLM, teacher: CausalLM, examples: Sequence[Example], settings: EvalConfig
) -> tuple[Estimate, Estimate]:
    """Reverse and forward KL, nats per token, along the reference answers."""
    reverse: list[Tensor] = []
    forward: list[Tensor] = []
    size = max(1, settings.batch_size // 4)  # whole sequences: several times longer than a decoding step
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        batch = collate([e.prompt for e in part], [e.response for e in part]).to(student.device)
        models = (*student.output(batch), *teacher.output(batch))
        vocab_size = common_vocabulary(student, teacher)
        stats = fused_linear_distill_stats(*models, batch.targets, vocab_size=vocab_size)
        lengths = [len(e.response) for e in part]
        reverse += [piece.sum() for piece in stats.reverse_kl.split(lengths)]
        forward += [piece.sum() for piece in stats.forward_kl.split(lengths)]
    counts = torch.tensor([len(e.response) for e in examples], dtype=torch.float64)
    return (
        Estimate(torch.stack(reverse).double().cpu(), counts),
        Estimate(torch.stack(forward).double().cpu(), counts),
    )
