"""Calibration: is a model right as often as it is sure?

ECE = Σ_m (n_m / N) |accuracy_m - confidence_m| over M equal bins ((m-1)/M, m/M] of confidence (Guo et al., 2017). The
confidence is the largest probability that the model gives, of a next token or of one of a question's options.

Legend: N predictions, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.config.schema import EvalConfig
from minillm.data.examples import Example, collate
from minillm.evaluate.means import Estimate
from minillm.model.head import CausalLM, Output
from minillm_kernels import fused_linear_token_logprobs, token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BINS = 10


def reliability(confidence: Tensor, correct: Tensor, bins: int = BINS) -> dict[str, Any]:
    """ECE, and per bin the number of predictions, their mean confidence and accuracy (None in an empty bin).

    `confidence` [N] in [0, 1], `correct` [N] bool. Raises ValueError for none, or confidences that are none.
    """
    confidence, correct = confidence.double().cpu(), correct.double().cpu()
    if confidence.shape != correct.shape or confidence.dim() != 1 or not len(confidence):
        raise ValueError(f"calibration needs [N] confidences, N > 0, and as many outcomes; got {confidence.shape}")
    if not ((confidence >= 0) & (confidence <= 1 + 1e-6)).all():
        raise ValueError("confidences must be probabilities, between 0 and 1")
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts, sure, right = (
        torch.zeros(bins, dtype=torch.float64).index_add(0, index, values)
        for values in (torch.ones_like(correct), confidence, correct)
    )
    return {
        "ece": float((right - sure).abs().sum() / len(correct)),
        "accuracy": float(correct.mean()),
        "confidence": float(confidence.mean()),
        "count": len(correct),
        "bins": [
            {
                "lower": m / bins,
                "upper": (m + 1) / bins,
                "count": int(counts[m]),
                "confidence": float(sure[m] / counts[m]) if counts[m] else None,
                "accuracy": float(right[m] / counts[m]) if counts[m] else None,
            }
            for m in range(bins)
        ],
    }


@torch.no_grad()
def next_token(model: CausalLM, examples: Sequence[Example], settings: EvalConfig) -> tuple[dict[str, Any], Estimate]:
    """Calibration of the most likely next token along the reference answers, and the cross entropy of these, in nats
    per token."""
    confidence, correct, losses = [], [], []
    size = max(1, settings.batch_size // 4)
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        batch = collate([e.prompt for e in part], [e.response for e in part]).to(model.device)
        output = model.output(batch)
        best, top = most_likely(model, output)
        confidence.append(top)
        correct.append(best == batch.targets)
        loss = -fused_linear_token_logprobs(*output, batch.targets)
        losses += [piece.sum() for piece in loss.split([len(e.response) for e in part])]
    counts = torch.tensor([len(e.response) for e in examples], dtype=torch.float64)
    return reliability(torch.cat(confidence), torch.cat(correct)), Estimate(torch.stack(losses).double().cpu(), counts)


def most_likely(model: CausalLM, output: Output) -> tuple[Tensor, Tensor]:
    """[N] ids and probabilities of the most likely next tokens, over a few rows of logits at a time."""
    ids, probabilities = [], []
    for states in output.states.split(max(1, 2**24 // model.vocab_size)):
        logits = model.logits(states)
        ids.append(logits.argmax(-1))
        probabilities.append(token_logprobs(logits, ids[-1]).exp())
    return torch.cat(ids), torch.cat(probabilities)


@torch.no_grad()
def options(
    model: CausalLM, tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example], settings: EvalConfig
) -> dict[str, Any] | None:
    """Calibration of the choice among each question's options; None where no record has any.

    The probability of an option is that of its tokens after the prompt (no end-of-sequence: label words), normalised
    over the options of its question. So no option should be the beginning of another.
    """
    asked = [example for example in examples if example.record.options]
    flat = [
        (example.prompt, tokenizer.encode(option, add_special_tokens=False))
        for example in asked
        for option in example.record.options
    ]
    scores = []
    for start in range(0, len(flat), settings.batch_size):
        prompts, answers = zip(*flat[start : start + settings.batch_size], strict=True)
        batch = collate(prompts, answers).to(model.device)
        logprobs = fused_linear_token_logprobs(*model.output(batch), batch.targets)
        scores += [piece.double().sum().cpu() for piece in logprobs.split([len(answer) for answer in answers])]
    if not asked:
        return None
    confidence, correct = [], []
    for example, logits in zip(asked, torch.stack(scores).split([len(e.record.options) for e in asked]), strict=True):
        top = logits.softmax(0).max(0)
        confidence.append(top.values)
        correct.append(example.record.options[int(top.indices)] in example.record.references)
    return reliability(torch.stack(confidence), torch.tensor(correct))
