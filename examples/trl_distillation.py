"""TRL's distillation trainers with their loss replaced: GKDTrainer in four lines, and DistillationTrainer.

Written against trl 1.16.0. TRL forms log-softmaxes of both models, [B, T, V] each (GKDTrainer), or walks over tiles
of the vocabulary (DistillationTrainer). Loss and gradients stay what they are, for every beta in the first, for
beta = 1 (reverse KL, TRL's default) in the second.

    python examples/trl_distillation.py
"""

import os
import tempfile
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # GKDTrainer lives in trl.experimental

import torch
from datasets import Dataset
from tiny import byte_tokenizer, tiny_llama
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from minillm.model.head import read_head
from minillm_kernels import fused_divergence_loss, fused_linear_minillm_loss


class FusedGKDTrainer(GKDTrainer):
    @staticmethod
    def generalized_jsd_loss(student_logits, teacher_logits, num_items_in_batch=None, **same):
        return fused_divergence_loss(student_logits, teacher_logits, "jsd", normalizer=num_items_in_batch, **same)


class FusedDistillationTrainer(DistillationTrainer):
    """For text models in one process or under DDP; beta must be 1.

    MiniLLM's objective with advantages 0 is the reverse KL, and gives the entropy that TRL logs in the same sweep.
    """

    def _compute_loss(self, student, inputs, num_items_in_batch):
        if self.beta != 1:
            raise ValueError(f"FusedDistillationTrainer is for reverse KL, beta = 1, got beta = {self.beta}")
        teacher, tokens = self.teacher_model.eval(), inputs["completion_ids"]
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
        ids, attention = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        with torch.no_grad():
            teacher_hidden = self._get_last_hidden_state(teacher, ids, attention, tokens.size(1))
        result = fused_linear_minillm_loss(
            self._get_last_hidden_state(student, ids, attention, tokens.size(1)),
            read_head(student),
            teacher_hidden,
            read_head(teacher).detach(),
            tokens.where(mask, -100),
            advantages=torch.zeros(()),
            old_logprobs=torch.zeros(()),
            normalizer=num_items_in_batch,
            temperature=self.temperature,
        )
        return result.loss, result.entropy.sum(), mask.sum()


PROMPTS = ["Say a.", "Count to three.", "Name a colour and an animal.", "Why?"]
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "beta": 1.0,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def gkd(output: str, trainer: type[GKDTrainer] = FusedGKDTrainer, **settings: Any) -> GKDTrainer:
    """A trainer on fixed answers (lmbda 0; 1 would let the student write them)."""
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": p[::-1]}] for p in PROMPTS]
    return trainer(
        model=tiny_llama(layers=1, seed=1),
        teacher_model=tiny_llama(layers=2),
        args=GKDConfig(output_dir=output, lmbda=0.0, **SETTINGS | settings),
        train_dataset=Dataset.from_dict({"messages": turns}),
        processing_class=byte_tokenizer(),
    )


def distillation(
    output: str, trainer: type[DistillationTrainer] = FusedDistillationTrainer, **settings: Any
) -> DistillationTrainer:
    """A trainer on the student's own answers."""
    return trainer(
        model=tiny_llama(layers=1, seed=1),
        teacher_model=tiny_llama(layers=2),
        args=DistillationConfig(output_dir=output, max_completion_length=12, **SETTINGS | settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=byte_tokenizer(),
    )


if __name__ == "__main__":
    for build in (gkd, distillation):
        with tempfile.TemporaryDirectory() as output:
            trainer = build(output)
            trainer.train()
            print(build.__name__, [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry])
