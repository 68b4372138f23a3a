"""Validation while training, and the weights a stage ends with: those of its best validation.

The paper keeps the lowest validation loss of the supervised methods and the best validation ROUGE-L of MiniLLM: the
sequence-level objective has no validation loss that means the same under every student.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minillm.config.schema import ConfigError, RunConfig, StageConfig
from minillm.data.examples import Encoded, Example, encode, read_records
from minillm.evaluation.share import over_batches
from minillm.evaluation.text import rouge_l
from minillm.model.head import Scorer
from minillm.model.sampling import greedy_responses
from minillm.parallel.gathered import gathered
from minillm.run.checkpoint import CheckpointError, Progress, read_weights, restore_weights, write_weights
from minillm.train.baselines import Given, Gkd
from minillm.train.context import Context
from minillm.train.minillm import MiniLLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def split_validation(
    run: RunConfig, config: StageConfig, encoded: Encoded, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to validate on.

    The latter are those of validation.data, or else are held out from data.train by a hash of their prompts, so that
    all stages of a recipe hold out the same.
    """
    source, count = config.validation.data, config.validation.prompts
    if source:
        found = encode(read_records(source), tokenizer, run.data, config.data, source, answers=True).examples
        return encoded.examples, found[:count]

    def key(example: Example) -> bytes:
        return hashlib.sha256(f"{run.seed} {example.record.prompt}".encode()).digest()

    answered = sorted({key(e) for e in encoded.examples if (e.record.answer or "").strip()})
    chosen = set(answered[: min(count, len(answered) // 10)])
    if not chosen:
        raise ConfigError(
            f"{config.data.train} has {len(answered)} prompts with answers, too few to hold a tenth of them out for "
            "validation: name validation.data, or set validation.every to 0"
        )
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in encoded.examples:
        parts[key(example) in chosen].append(example)
    return parts


class Selection:
    """Validates a stage before its first step, every `validation.every` steps and after its last. `progress.best` is
    the best so far.

    The weights of a new best are written beside those before, with their step in the name: a run that is resumed needs
    the ones that its checkpoint knows. Between equal scores the later weights win, so that a metric which cannot tell
    stages apart (ROUGE-L of responses without a common word) does not undo the training; a score that is not finite
    never wins.
    """

    def __init__(self, context: Context, method: Given | Gkd | MiniLLM, folder: Path) -> None:
        self.context, self.method, self.folder = context, method, folder

    def due(self, step: int) -> bool:
        settings, steps = self.context.config.validation, self.context.config.optim.steps
        return bool(self.context.validation) and (step % settings.every == 0 or step == steps)

    def path(self, step: int) -> Path:
        return self.folder / f"best-{step}.safetensors"

    def validate(self, progress: Progress) -> dict[str, float]:
        """The metric at this step; the weights are kept when none before was better."""
        context, method = self.context, self.method
        with context.clock("validation"), torch.no_grad(), gathered(context.student):
            if isinstance(method, MiniLLM):
                name, score, better = "validation/rouge_l", self._rouge(), 1
            else:
                name, score, better = "validation/loss", self._loss(method), -1
                if progress.step > 0:
                    method.validated(score)
        if math.isfinite(score) and (not progress.best or better * (score - progress.best["score"]) >= 0):
            progress.best = {"step": progress.step, "score": score}
            write_weights(context.student.model, self.path(progress.step))
        return {name: score}

    def forget(self, steps: Collection[float]) -> None:
        """Delete weights that neither this run nor a checkpoint of it can still ask for."""
        if self.context.accelerator.is_main_process:
            for path in self.folder.glob("best-*.safetensors"):
                if path not in {self.path(int(step)) for step in steps}:
                    path.unlink()

    def restore(self, progress: Progress) -> None:
        """Give the student the best weights again. Raises CheckpointError where they are gone or damaged."""
        if progress.best and progress.best["step"] != progress.step:
            self.context.accelerator.wait_for_everyone()
            restore_weights(self.context.student.model, self.weights(progress))

    def weights(self, progress: Progress) -> dict[str, Tensor]:
        """The best so far; none where they are those of this step."""
        if not progress.best or progress.best["step"] == progress.step:
            return {}
        path = self.path(int(progress.best["step"]))
        if not path.exists():
            raise CheckpointError(
                f"the weights of the best validation are gone: no {path}. The run directory must keep the folder "
                "stages/; run the stage again, or set validation.every to 0"
            )
        return read_weights(path, self.context.student.model)

    def _loss(self, method: Given | Gkd) -> float:
        """The method's loss per token of the references."""
        context = self.context

        def summed(start: int, examples: Sequence[Example]) -> tuple[float, int]:
            total, targets = 0.0, 0
            for part in method.parts(list(examples)):
                batch = part.batch(part.examples).to(context.accelerator.device)
                with context.autocast():
                    total += float(part.loss(context.student.output(batch), batch)["loss"])
                targets += len(batch.targets)
            return total, targets

        return self._mean(summed, context.config.optim.micro_batch_size, context.teacher)

    def _rouge(self) -> float:
        """Mean ROUGE-L of greedy responses against the references."""
        context, tokens = self.context, self.context.config.validation.greedy_tokens

        def scored(start: int, examples: Sequence[Example]) -> tuple[float, int]:
            prompts = [example.prompt for example in examples]
            with context.autocast():
                responses = greedy_responses(
                    context.student, context.tokenizer, prompts, tokens, len(prompts), context.ends
                )
            scores = rouge_l(responses, [example.record.references for example in examples])
            return float(scores.totals.sum()), len(examples)

        return self._mean(scored, context.run.eval.batch_size)

    def _mean(
        self, work: Callable[[int, Sequence[Example]], tuple[float, int]], size: int, *models: Scorer | None
    ) -> float:
        """Of sums and counts, one of each batch, that `work` asks these models for."""
        sums, counts = zip(*over_batches(work, self.context.validation, size, *models), strict=True)
        return sum(sums) / sum(counts)
