"""Reverse KL in `transformers.Trainer`: compute_loss overridden, right under gradient accumulation.

Trainer counts the tokens of all micro-batches of a step before the first of them; as `normalizer=` that count makes
one batch of 8 and eight of 1 the same step, also when the sequences differ in length.

    python examples/transformers_trainer.py
"""

import tempfile
from typing import Any

import torch
from tiny import ragged_batch, tiny_llama
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from minillm_kernels import fused_rkl_loss


class DistillationTrainer(Trainer):
    """`Trainer` that learns from `teacher`. Batches hold input_ids, attention_mask and labels (-100: not counted)."""

    loss_is_scaled_for_ga = True  # transformers >= 5.19: Trainer does not divide by the number of micro-batches

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).requires_grad_(False).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        # the count is over all processes, and data parallelism averages their gradients
        normalizer = None if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        loss = fused_rkl_loss(outputs.logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:], normalizer=normalizer)
        return (loss, outputs) if return_outputs else loss


def build(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], output: str, **settings: Any
) -> DistillationTrainer:
    """A trainer on the rows of `batch`."""
    rows = [{name: x[i] for name, x in batch.items()} for i in range(len(batch["labels"]))]
    arguments = TrainingArguments(
        output_dir=output,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    return DistillationTrainer(student, arguments, train_dataset=rows, teacher=teacher)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as output:
        trainer = build(
            tiny_llama(layers=1, seed=1),
            tiny_llama(layers=2),
            ragged_batch(lengths=(5, 16, 7, 12, 4, 9, 14, 6)),
            output,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=30,
            logging_steps=10,
        )
        trainer.train()
        print([round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry])
