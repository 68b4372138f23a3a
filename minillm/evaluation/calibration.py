"""Calibration: is a model right as often as it is sure?

ECE = Σ_m (n_m / N) |accuracy_m - confidence_m| over M equal bins ((m-1)/M, m/M] of confidence (Guo et al., 2017). The
confidence is the largest probability that the model gives to a next token, or to one of the options of a question.

Legend: N predictions, H hidden, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.config.schema import EvalConfig
from minillm.data.examples import Example, collate
from minillm.evaluation.divergence import Author, by_sequence
from minillm.evaluation.means import Mean
from minillm.evaluation.share import over_batches
from minillm.model.head import Output
from minillm_kernels import fused_linear_token_logprobs, token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BINS = 10


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence lies in (lower, upper]."""

    lower: float
    upper: float
    count: int
    confidence: float
    """Mean of the bin; NaN of an empty one."""
    accuracy: float
    """Share that is right; likewise."""


@dataclass(frozen=True)
class Reliability:
    """How a model's confidence compares with its accuracy, over `count` predictions."""

    ece: float
    accuracy: float
    confidence: float
    count: int
    bins: tuple[Bin, ...]

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Reliability":
        return cls(**{**tree, "bins": tuple(Bin(**each) for each in tree["bins"])})


def reliability(confidence: Tensor, correct: Tensor, bins: int = BINS) -> Reliability:
    """ECE and its bins, of `confidence` [N] in [0, 1] and `correct` [N] bool.

    Raises ValueError for no predictions, or confidences outside [0, 1].
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
    found = []
    for m in range(bins):
        n = int(counts[m])
        share = (float(sure[m] / n), float(right[m] / n)) if n else (math.nan, math.nan)
        found.append(Bin(m / bins, (m + 1) / bins, n, *share))
    ece = float((right - sure).abs().sum() / len(correct))
    return Reliability(ece, float(correct.mean()), float(confidence.mean()), len(correct), tuple(found))


@torch.no_grad()
def next_token(model: Author, examples: Sequence[Example], settings: EvalConfig) -> tuple[Reliability, Mean]:
    """Calibration of the most likely next token along the references, and the cross entropy of these, in nats per
    token."""

    def predicted(start: int, part: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
        batch = collate([e.prompt for e in part], [e.response for e in part]).to(model.device)
        output = model.output(batch)
        best, top = most_likely(model, output)
        losses = by_sequence(-fused_linear_token_logprobs(*output, batch.targets), [len(e.response) for e in part])
        return top.cpu(), (best == batch.targets).cpu(), losses

    found = over_batches(predicted, examples, max(1, settings.batch_size // 4), model)
    confidence, correct, losses = (torch.cat(column) for column in zip(*found, strict=True))
    counts = torch.tensor([len(e.response) for e in examples], dtype=torch.float64)
    return reliability(confidence, correct), Mean.of(losses, counts)


def most_likely(model: Author, output: Output) -> tuple[Tensor, Tensor]:
    """[N] ids and probabilities of the most likely next tokens; makes logits for a few rows at a time."""
    ids, probabilities = [], []
    for states in output.states.split(max(1, 2**24 // model.vocab_size)):
        logits = model.logits(states)
        ids.append(logits.argmax(-1))
        probabilities.append(token_logprobs(logits, ids[-1]).exp())
    return torch.cat(ids), torch.cat(probabilities)


@torch.no_grad()
def options(
    model: Author, tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example], settings: EvalConfig
) -> Reliability | None:
    """Calibration of the choice among each question's options; None if no record has options.

    The probability of an option is that of its tokens after the prompt, normalised over the options of its question.
    End-of-sequence is not counted, since options are label words; so no option should be the beginning of another.
    """
    asked = [example for example in examples if example.record.options]
    flat = [
        (example.prompt, tokenizer.encode(option, add_special_tokens=False))
        for example in asked
        for option in example.record.options
    ]
    if not asked:
        return None

    def scored(start: int, part: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        prompts, answers = zip(*part, strict=True)
        batch = collate(prompts, answers).to(model.device)
        logprobs = fused_linear_token_logprobs(*model.output(batch), batch.targets)
        return by_sequence(logprobs.double(), [len(answer) for answer in answers])

    scores = torch.cat(over_batches(scored, flat, settings.batch_size, model))
    confidence, correct = [], []
    for example, logits in zip(asked, scores.split([len(e.record.options) for e in asked]), strict=True):
        top = logits.softmax(0).max(0)
        confidence.append(top.values)
        correct.append(example.record.options[int(top.indices)] in example.record.references)
    return reliability(torch.stack(confidence), torch.tensor(correct))
