"""MiniLLM: sequence-level reverse KL by policy gradient (arXiv 2306.08543, algorithm 1), in two variants.

    repeat    sample responses y ~ p̃ = α p + (1-α) q to a batch of prompts, and draw plain text d
              ∇L = ∇Single + ∇Long + ∇L_PT,   each a mean over its tokens
              update q_θ

`objective.variant: paper`, as printed:

    Single = w_t RKL_t                                    w_t = q(y_t) / p̃(y_t), RKL exact       (eq 3, 5)
    Long   = -min(ρ_t R_t, clip(ρ_t, 1±ε) R_t)            ρ_t = q_θ(y_t) / p̃(y_t)           (algorithm 1)
    R_t    = 1/(T-t) Σ_{t'>t} r_t';  0 at t = T           r_t = log p(y_t) - log q(y_t)             (eq 6)
    L_PT   = -log q(d_t) over plain text

`objective.variant: reference`, what the authors' code runs:

    Single = RKL_t
    Long   = the same with Â_t for R_t
    R_t    = 1/(T-t+1) Σ_{t'≥t} 0.95^(t'-t) r̂_t'          r̂_t = clip((log p(y_t) - log q(y_t)) / 0.5, ±100)
    Â_t    = (R_t - mean R) / √(var R + 1e-8)              over the valid tokens of the optimiser step
    L_PT   = -½ log q(d_t) - ½ Σ_v p(v) log q(v) over plain text

Here p̃ is the mixture that was sampled, q in w_t and r_t the student that sampled, and t = 1 … T. Every piece is a key
of its own in the section `objective`. The paper prints 1/(T-t-1) for the mean, which is 0 one token before the last;
here the sum is divided by its number of terms. The authors' code also counts padding in the mean and variance of R,
and whitens each micro-batch by itself; here whitening does not depend on how the work is split. The soft cross entropy
of L_PT enters as KL(p‖q), which has the same gradient.

With `objective.reward`, a task's reward G(y) of the whole response times `reward_coef` is added to R_t at every token,
the last one included; `whiten` then shifts and scales the sum.

With α > 0, one ratio in place of the product of ratios and the normalised return make this a biased estimate of the
gradient of KL(q‖p). It is exact at α = 0 with plain sums.

Legend: B responses, T positions, N tokens of a batch.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from minillm.config.schema import ObjectiveConfig
from minillm.data.examples import Batch, Example, PolicyConstants, Record, Shuffled
from minillm.engine.rollout import engine_gap, engine_weights
from minillm.model.head import CausalLM, Output, Sums
from minillm.model.rollout import Rollout, renewed, share_of
from minillm.train.ahead import Ahead
from minillm.train.context import Context, Part, Step
from minillm.train.reward import load_reward, rewards_of
from minillm_kernels import fused_linear_distill_loss, fused_linear_minillm_loss

TASK = "task_reward"
"""Its name in the memory of a checkpoint."""
AHEAD = "ahead."
"""What the names of a rollout begin with, in the memory, that was sampled ahead."""


class MiniLLM:
    """Samples responses to a batch of prompts, then passes over them `rollout.epochs` times in minibatches."""

    def __init__(self, context: Context, folder: Path) -> None:
        rollout, optim, seed = context.config.rollout, context.config.optim, context.run.seed
        self.context = context
        self.steps_per_rollout = rollout.epochs * rollout.batch_size // optim.batch_size
        self.prompts = Shuffled(len(context.examples), seed)
        self.text = Shuffled(len(context.text), seed + 1)
        self.minibatches = Shuffled(rollout.batch_size, seed + 2)
        self.reward = load_reward(context.config.objective.reward) if context.config.objective.reward else None
        self.task: Tensor | None = None
        """[B] the task's rewards of its responses."""
        self.rollout: Rollout | None = None
        self.next: Rollout | None = None
        """The one sampled ahead, where it is ready."""
        self.ahead = Ahead(context.student, context.compute_dtype)
        self.sampled: list[Example] = []
        """Its responses, with all that the objective asks of their tokens."""
        self.metrics: dict[str, Tensor] = {}

    def step(self, number: int) -> Step:
        """What step `number`, from 1, learns from."""
        context, config, done = self.context, self.context.config, number - 1
        iteration, used = divmod(done, self.steps_per_rollout)

        # ---- y ~ p̃: all that the objective asks of the sampled tokens is known from here on
        if used == 0 or self.rollout is None:
            examples, rollout = self.prompted(iteration), self.rolled_out(iteration)
            if self.reward is not None:
                values = rewards_of(self.reward, context, examples, rollout.responses())
                self.task = torch.tensor(values, dtype=torch.float32).to(rollout.lengths.device)
            self.learn_from(rollout, examples)
            if config.rollout.overlap and (iteration + 1) * self.steps_per_rollout < config.optim.steps:
                self.ahead.start(partial(self.draw, iteration + 1, self.prompted(iteration + 1)))

        # ---- a minibatch of the responses: R_t, log q(y_t) and w_t ride with their tokens
        rows = self.minibatches.take(done * config.optim.batch_size, config.optim.batch_size)
        minibatch = [self.sampled[row] for row in rows]
        if config.objective.whiten:
            fixed = whiten([example.policy for example in minibatch if example.policy is not None])
            minibatch = [example._replace(policy=each) for example, each in zip(minibatch, fixed, strict=True)]
        parts = [
            Part("responses", context.mine(minibatch), context.beside_teacher(self.policy_loss), context.row_length)
        ]

        # ---- d, plain text
        if config.objective.pt_weight > 0:
            size = config.objective.pt_batch_size
            text = [self.passage(i) for i in self.text.take(done * size, size)]
            asks = config.objective.pt_teacher > 0
            loss = context.beside_teacher(self.text_loss) if asks else self.text_loss
            parts.append(Part("text", context.mine(text), loss, asks_teacher=asks))
        return Step(parts, self.metrics)

    def learn_from(self, rollout: Rollout, examples: list[Example]) -> None:
        """Make this the rollout in use. What it fixes is worked out here, once, however often its tokens are used."""
        assert rollout.teacher_hidden is not None
        self.rollout, self.metrics = rollout, describe_rollout(rollout)
        config = self.context.config
        if self.task is not None:
            self.metrics["reward/task"] = self.task.mean()
        fixed = policy_constants(rollout, config.objective, config.rollout.engine_correction, self.task)
        self.sampled = [
            example._replace(response=response, turns=(), policy=policy, teacher_states=states[: len(response)])
            for example, response, policy, states in zip(
                examples, rollout.responses(), fixed, rollout.teacher_hidden, strict=True
            )
        ]

    def policy_loss(self, student: Output, batch: Batch) -> Sums:
        """Single + Long, from what the rollout fixed: the teacher's states and the constants of each token."""
        settings, teacher = self.context.config.objective, self.context.teacher
        assert teacher is not None and batch.teacher_states is not None and batch.policy is not None
        result = fused_linear_minillm_loss(
            *student,
            batch.teacher_states,
            teacher.head,
            batch.targets,
            advantages=batch.policy.advantages,
            old_logprobs=batch.policy.old_logprobs,
            importance_weights=batch.policy.importance_weights,
            clip_range=settings.clip_range or math.inf,
            single_step=float(settings.single_step),
            weight_single_step=settings.weight_single_step,
            normalizer=batch.policy.advantages.new_ones(()),  # sums: the loop divides; a number would have to be moved
            vocab_size=self.context.vocab_size,
        )
        return {
            "loss": result.loss,
            "loss/policy": result.policy_loss,
            "loss/single_step": result.single_step_loss,
            "kl/reverse": result.reverse_kl.sum(),
            "entropy": result.entropy.sum(),
            "clip_fraction": result.clip_fraction * len(batch.targets),
        }

    def text_loss(self, student: Output, batch: Batch) -> Sums:
        """L_PT: cross entropy with the text and, for a share pt_teacher, with the teacher's distribution."""
        settings = self.context.config.objective
        states, head = self.context.score(batch) if settings.pt_teacher else (None, None)
        total = fused_linear_distill_loss(
            *student,
            states,
            head,
            batch.targets,
            forward_kl=settings.pt_teacher,
            student_logprobs=settings.pt_teacher - 1,
            vocab_size=self.context.vocab_size,
        ).loss
        return {"loss": settings.pt_weight * total, "loss/pt": total}

    def rolled_out(self, iteration: int) -> Rollout:
        """The responses that an iteration learns from: sampled now, or ahead."""
        context = self.context
        if self.next is None and not self.wait():
            with context.clock("rollout"):
                drawn = self.draw(iteration, self.prompted(iteration), context.student)
                return context.of_all(drawn, context.teacher)
        accelerator, ahead, self.next = context.accelerator, self.next, None
        assert ahead is not None
        mine = share_of(ahead, accelerator.process_index, accelerator.num_processes)
        with context.clock("rollout"), context.autocast():
            mine = renewed(mine, context.student, context.vocab_size, context.row_length)
            return context.of_all(mine, context.teacher)

    def draw(self, iteration: int, examples: list[Example], student: CausalLM) -> Rollout:
        """This process's share of an iteration's responses; may run in another thread."""
        context, begun = self.context, iteration * self.steps_per_rollout
        return context.draw(student, iteration, examples, context.teacher, context.config.rollout.alpha, begun)

    def wait(self) -> bool:
        """Whether there are responses that were sampled ahead, which all processes know then."""
        with self.context.clock("rollout"):
            drawn = self.ahead.take()
            if drawn is not None:
                self.next = self.context.of_all(drawn, self.context.teacher)
        return self.next is not None

    def prompted(self, iteration: int) -> list[Example]:
        """The examples whose prompts an iteration samples responses to."""
        size = self.context.config.rollout.batch_size
        return [self.context.examples[i] for i in self.prompts.take(iteration * size, size)]

    def passage(self, index: int) -> Example:
        """A chunk of text, learnt from after its first token."""
        text, where = self.context.text[index], f"{self.context.config.data.text}, chunk {index + 1}"
        return Example(Record([], None, where), text[:1], text[1:])

    @property
    def memory(self) -> dict[str, Tensor]:
        """The rollout in use and the one sampled ahead, without their prompts: the step's number tells them."""
        self.wait()
        both = {"": self.rollout, AHEAD: self.next}
        fields: dict[str, Any] = {
            f"{which}{k}": v for which, each in both.items() if each is not None for k, v in each._asdict().items()
        }
        fields |= {TASK: self.task}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}

    def remember(self, memory: dict[str, Any], number: int) -> None:
        """Restore the rollout that step `number` used, from the memory it left."""
        iteration = (number - 1) // self.steps_per_rollout
        ahead = {name.removeprefix(AHEAD): value for name, value in memory.items() if name.startswith(AHEAD)}
        now = {name: value for name, value in memory.items() if not name.startswith(AHEAD)}
        self.task = now.pop(TASK, None)
        self.learn_from(self.remembered(iteration, now), self.prompted(iteration))
        self.next = self.remembered(iteration + 1, ahead) if ahead else None

    def remembered(self, iteration: int, fields: dict[str, Any]) -> Rollout:
        prompts = [example.prompt for example in self.prompted(iteration)]
        return Rollout(prompts=prompts, student_hidden=None, **fields)


# ---- what a rollout fixes


def policy_constants(
    rollout: Rollout, objective: ObjectiveConfig, engine_correction: float = 0.0, task: Tensor | None = None
) -> list[PolicyConstants]:
    """The constants of each response, trimmed to its length; the returns are not whitened yet. `engine_correction` is
    the largest weight of a token by which an engine's law is corrected (minillm/engine/rollout.py), 0 for none, `task`
    [B] the task's reward of each.

    Without the single-step term, a token's own reward can only come from its return (eq 2), which then includes it.
    """
    rewards = token_rewards(rollout) / objective.reward_scaling
    if objective.reward_clip:
        rewards = rewards.clamp(-objective.reward_clip, objective.reward_clip)
    advantages = returns(
        rewards,
        rollout.mask,
        length_norm=objective.length_norm,
        include_current=objective.include_current or not objective.single_step,
        discount=objective.discount,
    )
    if task is not None:  # of the whole response, so that it follows every token of it
        advantages = advantages + objective.reward_coef * task[:, None].to(advantages.dtype)
    weights = importance_weights(rollout) if objective.importance_weights else torch.ones_like(advantages)
    if engine_correction and rollout.engine_logprobs is not None:
        weights = weights * engine_weights(rollout, engine_correction)
    columns = zip(map(len, rollout.responses()), advantages, rollout.student_logprobs, weights, strict=True)
    return [PolicyConstants(a[:n], q[:n], w[:n]) for n, a, q, w in columns]


def token_rewards(rollout: Rollout) -> Tensor:
    """[B, T] r_t = log p(y_t) - log q(y_t)."""
    assert rollout.teacher_logprobs is not None
    return rollout.teacher_logprobs - rollout.student_logprobs


def returns(
    rewards: Tensor, mask: Tensor, *, length_norm: bool = True, include_current: bool = False, discount: float = 1.0
) -> Tensor:
    """[B, T] R_t: the discounted mean (or, without length_norm, sum) of the rewards after each token; 0 where there
    is none. `include_current` counts the token's own reward too.
    """
    sums, reach = torch.where(mask, rewards, torch.zeros_like(rewards)), 1  # sums of `reach` terms each
    while reach < sums.shape[1]:
        sums = sums + discount**reach * pad(sums[:, reach:], (0, reach))
        reach *= 2
    if not include_current:
        sums = pad(sums[:, 1:], (0, 1))
    if length_norm:
        terms = mask.to(rewards.dtype).flip(1).cumsum(1).flip(1) - (0 if include_current else 1)
        sums = sums / terms.clamp(min=1)
    return torch.where(mask, sums, torch.zeros_like(sums))


def importance_weights(rollout: Rollout) -> Tensor:
    """[B, T] w_t = q(y_t) / p̃(y_t), at most 1 / (1-α)."""
    return torch.exp(rollout.student_logprobs - rollout.mixture_logprobs)


def whiten(constants: Sequence[PolicyConstants]) -> list[PolicyConstants]:
    """The same with Â_t: advantages of mean 0 and variance 1 over all tokens of these responses."""
    joined = torch.cat([policy.advantages for policy in constants])
    scale, mean = torch.rsqrt(joined.var(correction=0) + 1e-8), joined.mean()
    return [policy._replace(advantages=(policy.advantages - mean) * scale) for policy in constants]


def describe_rollout(rollout: Rollout) -> dict[str, Tensor]:
    """Means per token, and the mean length, of what all processes sampled."""
    per_token = {"reward/mean": token_rewards(rollout), "rollout/from_teacher": rollout.from_teacher}
    if rollout.older_logprobs is not None:
        per_token["rollout/staleness"] = (rollout.student_logprobs - rollout.older_logprobs).abs()
    if rollout.decoded_logprobs is not None:
        per_token["rollout/logprob_drift"] = (rollout.student_logprobs - rollout.decoded_logprobs).abs()
    tokens, nothing = rollout.lengths.sum(), torch.zeros_like(rollout.student_logprobs)
    means = {name: torch.where(rollout.mask, value, nothing).sum() / tokens for name, value in per_token.items()}
    if rollout.engine_logprobs is not None:
        means["rollout/engine_gap"] = engine_gap(rollout)
    return means | {"completions/mean_length": tokens / len(rollout.lengths)}
