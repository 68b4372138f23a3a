"""Configuration: one flat frozen dataclass per concern, and what must hold between their values.

A *config* describes one training run; minillm/config/recipe.py reads it from YAML and flags.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minillm_kernels.rows import DIVERGENCES

METHODS = ("sft", "kd", "seqkd", "gkd", "minillm")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key, what was expected and what to do."""


@dataclass(frozen=True)
class Model:
    teacher: str = ""
    """Hub id, local directory, or `package:NAME` (minillm/data/packages.py lists the names)."""
    student: str = ""
    """The same; empty: cut from the teacher by `drop_layers`."""
    drop_layers: tuple[int, int] | None = None
    """Half-open block [first, last) of teacher layers that the cut student does without."""
    dtype: str = "float32"
    """Dtype in which both models are loaded."""
    head: str = "fused"
    """`fused`: losses read final states and head weights, no logits; `logits`: the models' own logits, for a model
    whose head cannot be read."""
    recompute: bool = False
    """Keep only the inputs of the student's layers and compute the rest again in the backward pass: less memory for a
    third more work, the same gradient."""
    attn: str = "auto"
    """Attention of both models: `auto` (flash-attention 2 where it is installed, on CUDA, in half precision; otherwise
    what transformers chooses, usually sdpa), or a name that transformers knows. What ran stands in summary.json."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the student (needs `peft`); only they are trained, and export merges them."""

    rank: int = 0
    """Rank of the adapters; 0: none, all weights are trained."""
    alpha: int = 32
    """Their scale is alpha / rank."""
    targets: str = "all-linear"
    """`all-linear` (all but the vocabulary head), or module names separated by commas, such as q_proj,v_proj."""


@dataclass(frozen=True)
class Data:
    """A source is a JSONL or Parquet file, a directory written by `datasets`, a hub id (ORG/NAME or ORG/NAME:SPLIT) or
    `package:NAME`."""

    train: str = ""
    """Prompts, with answers for sft, kd and gkd."""
    text: str = ""
    """Plain text of the language-modelling loss L_PT: a .txt file, or a source with the column `text`."""
    eval: str = ""
    """Held-out prompts with reference answers; empty: no evaluation."""
    prompt_template: str = "chat"
    """`chat`: the tokenizer's chat template; `alpaca`: the paper's, with and without input; otherwise a text that
    contains {prompt}."""
    max_prompt_length: int = 256
    """Tokens of the longest prompt accepted."""
    max_response_length: int = 256
    """Tokens after which a reference answer is cut."""
    overlong_prompts: str = "error"
    """`error`, or `drop` to leave prompts longer than the limit out."""
    empty_answers: str = "error"
    """`error`, or `drop` to leave records out whose answer is empty, where answers are learnt from."""
    teacher_answers: str = ""
    """seqkd: JSONL file of the teacher's answers, written where it does not exist; empty: one in the run directory."""
    packing: bool = False
    """Several sequences of a micro-batch share a row, each attending to itself alone; never changes the gradient."""


@dataclass(frozen=True)
class Rollout:
    batch_size: int = 32
    """Prompts rolled out at once, over all processes."""
    max_new_tokens: int = 256
    """Longest response sampled, in tokens."""
    alpha: float = 0.2
    """minillm: weight of the teacher in the sampling mixture; 0 samples from the student alone."""
    on_policy: float = 0.5
    """gkd: share of the steps that learn from the student's own samples; the others learn from the answers given."""
    on_policy_step: float = 0.0
    """gkd: added to that share, up to 1, at each validation whose loss is 0.1 above the one before; 0: it stays.
    DistiLLM: 0.1, with on_policy 0 and loss.divergence skew_forward_kl, loss.beta 0.1."""
    temperature: float = 1.0
    """Sampling temperature (minillm, gkd, seqkd); MiniLLM requires 1."""
    top_k: int = 0
    """Keep the k most likely tokens, 0 for all; MiniLLM requires 0."""
    top_p: float = 1.0
    """Nucleus mass, 1 for all; MiniLLM requires 1."""
    epochs: int = 4
    """minillm: passes over each batch of rollouts before the next is sampled."""


@dataclass(frozen=True)
class Objective:
    """MiniLLM's objective (minillm/train/minillm.py has the formulas); each strategy can be switched off alone."""

    variant: str = "paper"
    """`paper`: the formulas as printed, which the defaults below are. `reference`: other defaults (VARIANTS), those of
    the authors' code; keys that are given still win."""
    single_step: bool = True
    """Single-step term, exact over the vocabulary; off: the return includes the token's own reward instead."""
    importance_weights: bool = True
    """Weigh tokens by w = student / mixture probability, as sampling from the mixture demands."""
    weight_single_step: bool = True
    """Whether w multiplies the single-step term too."""
    length_norm: bool = True
    """Mean rather than sum of the rewards of a return."""
    include_current: bool = False
    """Whether a token's return includes its own reward."""
    discount: float = 1.0
    """Weight of each later reward relative to the one before."""
    reward_scaling: float = 1.0
    """Rewards are divided by this."""
    reward_clip: float = 0.0
    """Then clipped to ± this; 0: not."""
    whiten: bool = False
    """Shift and scale the returns of each optimiser step to mean 0 and variance 1 over its tokens."""
    clip_range: float = 0.2
    """PPO clipping of the policy ratio; 0: no clipping."""
    pt_weight: float = 1.0
    """Weight of the loss on plain text, L_PT; 0: none."""
    pt_teacher: float = 0.0
    """Share of L_PT that is cross entropy with the teacher's distribution rather than with the text."""
    pt_batch_size: int = 8
    """Text chunks per optimiser step."""
    pt_length: int = 256
    """Tokens per text chunk."""


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "reference": {
        "weight_single_step": False,
        "include_current": True,
        "discount": 0.95,
        "reward_scaling": 0.5,
        "reward_clip": 100.0,
        "whiten": True,
        "pt_teacher": 0.5,
    },
}
"""Defaults of `objective` that a variant changes."""


@dataclass(frozen=True)
class Loss:
    """The word-level loss of kd and gkd: distill_weight · divergence + label_weight · cross entropy. On the student's
    own samples there are no labels, and the second term is absent."""

    divergence: str = "forward_kl"
    """reverse_kl | forward_kl | jsd | skew_forward_kl | skew_reverse_kl | tvd."""
    beta: float = 0.5
    """Parameter of jsd and of the skew divergences (DistiLLM: 0.1)."""
    temperature: float = 1.0
    """Temperature of both models inside the divergence."""
    distill_weight: float = 0.5
    """Weight of the divergence."""
    label_weight: float = 0.5
    """Weight of the cross entropy with the reference answers."""


@dataclass(frozen=True)
class Optim:
    steps: int = 100
    """Optimiser steps."""
    lr: float = 5e-6
    """Peak learning rate."""
    batch_size: int = 64
    """Sequences per optimiser step, over all processes."""
    micro_batch_size: int = 8
    """Sequences per forward and backward pass; changes memory and speed, never the gradient."""
    schedule: str = "constant"
    """`constant`, `linear` or `cosine` decay (to 0) after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moments."""
    weight_decay: float = 1e-6
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm clipped to this."""


@dataclass(frozen=True)
class Validation:
    """During training; the stage ends with the weights of its best validation: lowest loss, or for minillm highest
    ROUGE-L of greedy answers."""

    every: int = 100
    """Optimiser steps between validations; a stage of no more steps than that, or 0, does without."""
    data: str = ""
    """Prompts with answers; empty: held out from data.train, at most a tenth of it."""
    prompts: int = 64
    """Prompts validated on."""
    max_new_tokens: int = 64
    """Tokens of the greedy answers."""


@dataclass(frozen=True)
class Eval:
    prompts: int = 64
    """Prompts evaluated; 0: all."""
    max_prompt_length: int = 256
    """Longer prompts are left out of the evaluation."""
    samples: int = 2
    """Samples of the student per prompt for the reverse KL on its own text."""
    max_new_tokens: int = 32
    """Tokens per such sample."""
    temperature: float = 1.0
    """Sampling temperature of these samples; the objective is measured at 1."""
    rouge_new_tokens: int = 64
    """Tokens of the greedy answers scored by ROUGE-L."""
    batch_size: int = 64
    """Sequences decoded at once."""
    seed: int = 1234
    """Seed of prompts and uniforms: the same before and after training."""


@dataclass(frozen=True)
class Log:
    every: int = 1
    """Optimiser steps per log line."""
    trackers: str = ""
    """Where metrics go beside metrics.jsonl: names separated by commas that accelerate knows and that are installed,
    such as tensorboard,wandb,trackio. Of the first stage, for the whole run."""
    samples: int = 4
    """Prompts whose answers are written to samples.jsonl at each evaluation."""
    checkpoint_every: int = 0
    """Optimiser steps per checkpoint, and one at the end of a stage; 0: only when SIGTERM asks to stop."""
    checkpoints_kept: int = 2
    """Older ones are deleted."""


@dataclass(frozen=True)
class Config:
    method: str = "minillm"
    """sft | kd | seqkd | gkd | minillm."""
    output: str = ""
    """Run directory; empty: runs/NAME of the recipe."""
    seed: int = 0
    """Seed of data order, sampling and initialisation."""
    model: Model = field(default_factory=Model)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    rollout: Rollout = field(default_factory=Rollout)
    objective: Objective = field(default_factory=Objective)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    validation: Validation = field(default_factory=Validation)
    eval: Eval = field(default_factory=Eval)
    log: Log = field(default_factory=Log)


def check(config: Config) -> None:
    """Refuse settings that contradict each other or the method's mathematics."""
    one_of("method", config.method, METHODS)
    one_of("loss.divergence", config.loss.divergence, DIVERGENCES)
    one_of("optim.schedule", config.optim.schedule, ("constant", "linear", "cosine"))
    one_of("data.overlong_prompts", config.data.overlong_prompts, ("error", "drop"))
    one_of("data.empty_answers", config.data.empty_answers, ("error", "drop"))
    check_evaluation(config)
    _at_least_one(
        config,
        ("rollout", "batch_size"),
        ("rollout", "max_new_tokens"),
        ("rollout", "epochs"),
        ("objective", "pt_batch_size"),
        ("optim", "steps"),
        ("optim", "batch_size"),
        ("optim", "micro_batch_size"),
        ("log", "every"),
        ("log", "checkpoints_kept"),
        ("validation", "prompts"),
        ("validation", "max_new_tokens"),
    )
    if not config.data.train:
        raise ConfigError("data.train is empty: name a JSONL file or package:NAME to train on")
    if not config.model.teacher and (config.method != "sft" or config.model.drop_layers is not None):
        needs = "model.drop_layers" if config.model.drop_layers is not None else f"method {config.method}"
        raise ConfigError(f"{needs} needs model.teacher: a hub id, a directory or package:NAME")
    if not config.model.student and config.model.drop_layers is None:
        raise ConfigError("no student: set model.student, or model.drop_layers to cut it from the teacher")
    if config.model.student and config.model.drop_layers is not None:
        raise ConfigError("model.student and model.drop_layers are both set; keep one of them")
    for section, key in (
        ("rollout", "alpha"),
        ("rollout", "on_policy"),
        ("rollout", "on_policy_step"),
        ("loss", "beta"),
        ("objective", "pt_teacher"),
        ("objective", "discount"),
    ):
        value = getattr(getattr(config, section), key)
        if not 0 <= value <= 1:
            raise ConfigError(f"{section}.{key} is {value}; it lies in [0, 1]")
    if config.objective.reward_scaling <= 0:
        raise ConfigError(f"objective.reward_scaling is {config.objective.reward_scaling}; rewards are divided by it")
    if config.rollout.on_policy_step and not 0 < config.validation.every < config.optim.steps:
        raise ConfigError("rollout.on_policy_step follows the validation loss: set validation.every below optim.steps")
    if config.lora.rank < 0:
        raise ConfigError(f"lora.rank is {config.lora.rank}; give a rank, or 0 for no adapters")
    if config.method == "minillm":
        _check_minillm(config)


def check_evaluation(config: Config) -> None:
    """Refuse what evaluation alone, of any model, cannot use."""
    one_of("model.head", config.model.head, ("fused", "logits"))
    one_of("model.dtype", config.model.dtype, ("float32", "bfloat16", "float16"))
    _at_least_one(
        config,
        ("data", "max_prompt_length"),
        ("data", "max_response_length"),
        ("eval", "samples"),
        ("eval", "max_new_tokens"),
        ("eval", "rouge_new_tokens"),
        ("eval", "batch_size"),
    )
    if config.eval.prompts < 0:
        raise ConfigError(f"eval.prompts is {config.eval.prompts}; give a number, or 0 for all")
    template = config.data.prompt_template
    if template not in ("chat", "alpaca") and "{prompt}" not in template:
        raise ConfigError("data.prompt_template must be `chat`, `alpaca` or a text that contains {prompt}")


def _at_least_one(config: Config, *keys: tuple[str, str]) -> None:
    for section, key in keys:
        value = getattr(getattr(config, section), key)
        if value < 1:
            raise ConfigError(f"{section}.{key} is {value}; it must be at least 1")


def _check_minillm(config: Config) -> None:
    # Filtered or tempered log-probs are -inf or another law for the other model's tokens, so the importance weights
    # and rewards of the method exist only for the plain softmax of both models.
    for key, needed in (("temperature", 1), ("top_k", 0), ("top_p", 1)):
        value = getattr(config.rollout, key)
        if value != needed:
            raise ConfigError(f"rollout.{key} is {value}; MiniLLM's importance weights need {needed}")
    if config.loss.temperature != 1:
        raise ConfigError(f"loss.temperature is {config.loss.temperature}; MiniLLM's rewards are defined at 1")
    if config.objective.importance_weights and config.rollout.alpha == 1:
        raise ConfigError("rollout.alpha is 1: the student is never sampled and importance weights are unbounded")
    if config.rollout.batch_size % config.optim.batch_size:
        raise ConfigError(
            f"rollout.batch_size {config.rollout.batch_size} is not a multiple of optim.batch_size "
            f"{config.optim.batch_size}: every pass over the rollouts must use each of them once"
        )
    if config.objective.pt_weight > 0 and not config.data.text:
        raise ConfigError(
            "objective.pt_weight is above 0 but data.text is empty: name the text, or set the weight to 0"
        )
    if config.objective.pt_weight > 0 and config.objective.pt_length < 2:
        raise ConfigError(f"objective.pt_length is {config.objective.pt_length}; a text chunk needs at least 2 tokens")


def one_of(path: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(unknown(f"value of {path}:", value, allowed))


def unknown(what: str, name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {what} {name!r}; {hint}(known: {', '.join(allowed)})"
