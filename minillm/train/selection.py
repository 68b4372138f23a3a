"""Validation while training, and the weights a stage ends with: those of its best validation.

The paper keeps the lowest validation loss of the supervised methods and the best validation ROUGE-L of MiniLLM: the
sequence-level objective has no validation loss that means the same under every student.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from minillm.evaluation.text import rouge_l
from minillm.model.sampling import greedy_answers
from minillm.run.checkpoint import Progress, restore_weights, write_weights
from minillm.train.baselines import MiniLLM, Sft
from minillm.train.context import Training, chunks


class Selection:
    """Validates a stage every `validation.every` steps and after its last; `progress.best` is what it knows."""

    def __init__(self, training: Training, method: Sft | MiniLLM, folder: Path) -> None:
        self.training, self.method, self.path = training, method, folder / "best.safetensors"

    def due(self, step: int) -> bool:
        settings, steps = self.training.config.validation, self.training.config.optim.steps
        return bool(self.training.validation) and (step % settings.every == 0 or step == steps)

    def validate(self, progress: Progress) -> dict[str, float]:
        """The metric at this step; the weights are kept when none before was better."""
        training, method = self.training, self.method
        with training.clock("validation"), torch.no_grad():
            if isinstance(method, MiniLLM):
                name, score, better = "validation/rouge_l", self._rouge(), 1
            else:
                name, score, better = "validation/loss", self._loss(method), -1
                method.validated(score)
        if not progress.best or better * (score - progress.best["score"]) > 0:
            progress.best = {"step": progress.step, "score": score}
            if training.accelerator.is_main_process:
                write_weights(training.student.model, self.path)
        return {name: score}

    def restore(self, progress: Progress) -> None:
        """Give the student the best weights again."""
        if progress.best and progress.best["step"] != progress.step:
            self.training.accelerator.wait_for_everyone()
            restore_weights(self.training.student.model, load_file(self.path))

    def _loss(self, method: Sft) -> float:
        """Per token, on the reference answers."""
        training, examples = self.training, self.training.validation
        sums = torch.zeros(2, dtype=torch.float64)
        part = method.answers(examples, training.mine(list(range(len(examples)))))
        for rows in chunks(part.rows, training.config.optim.micro_batch_size):
            batch, loss = part.make(rows)
            batch = batch.to(training.accelerator.device)
            with training.accelerator.autocast():
                value = loss(training.student.output(batch), batch)["loss"]
            sums += torch.tensor([float(value), len(batch.targets)], dtype=torch.float64)
        total, count = self._over_processes(sums)
        return total / count

    def _rouge(self) -> float:
        """Of greedy answers."""
        training, settings = self.training, self.training.config
        examples = training.mine(training.validation)
        sums = torch.zeros(2, dtype=torch.float64)
        if examples:
            with training.accelerator.autocast():
                answers = greedy_answers(
                    training.student,
                    training.tokenizer,
                    [example.prompt for example in examples],
                    settings.validation.greedy_tokens,
                    training.run.eval.batch_size,
                )
            scores = rouge_l(answers, [example.record.references for example in examples])
            sums = torch.stack([scores.totals.sum(), scores.counts.sum()])
        total, count = self._over_processes(sums)
        return total / count

    def _over_processes(self, sums: torch.Tensor) -> list[float]:
        device = self.training.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return self.training.accelerator.reduce(sums.to(device, dtype), "sum").tolist()
