"""Reverse KL in a LightningModule.

python examples/lightning_module.py
"""

import lightning
import torch
from tiny import ragged_batch, tiny_llama
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from minillm_kernels import FusedRKLLoss


class Distillation(lightning.LightningModule):
    """The mean reverse KL over the tokens of a batch that count.

    With accumulate_grad_batches Lightning averages the means of the micro-batches; where their token counts differ,
    that weighs tokens differently, and `normalizer=` (tokens of the whole step / micro-batches) mends it.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.rkl = FusedRKLLoss()
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        labels = batch["labels"][:, 1:]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        loss = self.rkl(self.student(**inputs).logits[:, :-1], teacher_logits[:, :-1], labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=self.learning_rate)


def fit(module: Distillation, batches: list[dict[str, Tensor]], steps: int) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))  # batches as they are
    return trainer


if __name__ == "__main__":
    trainer = fit(Distillation(tiny_llama(layers=1, seed=1), tiny_llama(layers=2)), [ragged_batch()] * 30, steps=30)
    print(f"{trainer.callback_metrics['loss']:.4f} nats a token after 30 steps")
