"""Configuration: one flat frozen dataclass per section.

`RunConfig` is what all stages of a run share: the models, their evaluation, where results go. `StageConfig` is what
one stage of training does with them. The section `data` has keys of both. recipe.py reads them from YAML and flags,
check.py says what must hold between their values.
"""

from dataclasses import dataclass, field
from typing import Any

from minillm.config.engine import EngineConfig
from minillm.config.parallel import ParallelConfig
from minillm.config.rollout import RolloutConfig
from minillm.config.teacher import TeacherConfig


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key, what was expected and what to do."""


@dataclass(frozen=True)
class ModelConfig:
    teacher: str = ""
    """Hub id, local directory, or `package:NAME` (minillm/data/packages.py lists the names). Or a teacher that the run
    does not load: `http://HOST:PORT` of `minillm teach MODEL` or of vLLM (teacher.provider), several with commas
    between them, or the directory that `minillm teach MODEL --data D --out DIR` wrote."""
    student: str = ""
    """The same; empty: cut from the teacher by `drop_layers`."""
    drop_layers: tuple[int, int] | None = None
    """Half-open block [first, last) of teacher layers that the cut student does without."""
    dtype: str = "float32"
    """Dtype of the student's weights: float32 where they are trained, or bfloat16 under LoRA and under an
    optim.optimizer that keeps small updates; a model that is only evaluated may be float16 as well."""
    quantize: str = ""
    """`4bit` holds the frozen matrices below LoRA adapters in NF4 (QLoRA; needs bitsandbytes); head, embeddings and
    adapters stay as they are. Export merges the adapters into the weights so rounded."""
    compute_dtype: str = "auto"
    """Dtype in which the student's layers compute, from float32 weights: float32, bfloat16 or float16; `auto` is
    bfloat16 on CUDA and float32 elsewhere, or what accelerate was launched with."""
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
class LoraConfig:
    """Low-rank adapters on the student (needs `peft`); only they are trained, in float32, above a frozen base in the
    dtype that it computes in, and export merges them. A student that is a directory of adapters is trained further."""

    rank: int = 0
    """Rank of the adapters; 0: none, all weights are trained."""
    alpha: int = 32
    """Their scale is alpha / rank."""
    targets: str = "all-linear"
    """`all-linear` (all but the vocabulary head), or module names separated by commas, such as q_proj,v_proj."""
    modules_to_save: str = ""
    """Modules trained whole beside the adapters, names separated by commas, such as lm_head."""
    export: str = "merged"
    """What model/ holds: `merged`, a plain model, with the adapters alone in model/adapter/; or `adapter`, these
    alone, which name their base model."""


@dataclass(frozen=True)
class EvalDataConfig:
    """Keys of the section `data` that belong to the run. A source is a JSONL, JSON, CSV or Parquet file, a directory
    written by `datasets`, a hub id (ORG/NAME or ORG/NAME:SPLIT) or `package:NAME`."""

    eval: str = ""
    """Held-out prompts with reference answers; empty: no evaluation."""
    prompt_template: str = "chat"
    """`chat`: the tokenizer's chat template; `alpaca`: the paper's, with and without input; otherwise a text that
    contains {prompt}. Training and evaluation use the same one."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template reads beside the conversation, such as {enable_thinking: false}."""


@dataclass(frozen=True)
class DataConfig:
    """Keys of the section `data` that belong to a stage."""

    train: str = ""
    """Prompts, with answers for sft, kd and gkd."""
    text: str = ""
    """Plain text of the language-modelling loss L_PT: a .txt file, or a source with the column `text`."""
    max_prompt_length: int = 256
    """Tokens of the longest prompt accepted."""
    max_response_length: int = 256
    """Tokens of the longest answer learnt from, end-of-sequence included."""
    overlong_answers: str = "cut"
    """`cut` answers at the limit, after which nothing teaches the model to stop there, or `drop` the records."""
    overlong_prompts: str = "error"
    """`error`, or `drop` to leave prompts longer than the limit out."""
    empty_answers: str = "error"
    """`error`, or `drop` to leave records out whose answer is empty, where answers are learnt from."""
    train_on: str = "last"
    """sft, kd and gkd: `last`, the answer that ends a conversation, or `all`, every turn of the assistant in it. Which
    turns are sampled is said by `rollout_turns`."""
    rollout_turns: str = "last"
    """minillm, gkd and seqkd: `last`, the turn that ends a conversation is sampled, or `all`, every turn of the
    assistant in it, each after the conversation before it as it is given."""
    teacher_template: str = ""
    """What the teacher reads in the place of the last message: a text with {prompt}, {answer} (the record's), {hint}
    (its column). A record's own `teacher_prompt` goes before it; empty: what the student reads."""
    teacher_answers: str = ""
    """seqkd: JSONL file of the teacher's answers, written where it does not exist; empty: one in the run directory."""
    packing: bool = False
    """Several sequences of a micro-batch share a row, each attending to itself alone; never changes the gradient."""


@dataclass(frozen=True)
class ObjectiveConfig:
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
    reward: str = ""
    """A reward of the task beside the KL: a Python function by its import path, package.module:function. It is called
    with prompts, responses (texts) and records, and returns a number for each response."""
    reward_coef: float = 1.0
    """The task's reward times this is added to the return of every token of its response."""
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
class LossConfig:
    """The word-level loss of kd and gkd: distill_weight · divergence + label_weight · cross entropy. On the student's
    own samples there are no labels, and the second term is absent."""

    divergence: str = "forward_kl"
    """reverse_kl | forward_kl | jsd | skew_forward_kl | skew_reverse_kl | tvd."""
    beta: float = 0.5
    """Parameter of jsd and of the skew divergences (DistiLLM: 0.1)."""
    support: str = "full"
    """kd: what the divergence is taken over. `full`: the whole vocabulary, exactly; `top_k`: the teacher's most likely
    tokens, and one bucket for all others, which is all that a teacher stored by `minillm teach --top-k` knows."""
    temperature: float = 1.0
    """Temperature of both models inside the divergence."""
    distill_weight: float = 0.5
    """Weight of the divergence."""
    label_weight: float = 0.5
    """Weight of the cross entropy with the reference answers."""


@dataclass(frozen=True)
class OptimConfig:
    optimizer: str = "adamw"
    """AdamW in a form that may hold less memory: `adamw`, fused, of torch; for model.dtype bfloat16 `adamw_stochastic`
    (stochastic rounding, of torchao) or `adamw_kahan` (Kahan summation, of torch-optimi); `adamw_8bit` and
    `adamw_4bit` (moments of 8 and 4 bits, of torchao, with stochastic rounding of bfloat16 weights), `bnb_adamw_8bit`
    and `bnb_paged_adamw_8bit` (of bitsandbytes, for float32 weights)."""
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
class ValidationConfig:
    """During training; the stage ends with the weights of its best validation: lowest loss, or for minillm highest
    ROUGE-L of greedy answers."""

    every: int = 100
    """Optimiser steps between validations; a stage of no more steps than that, or 0, does without."""
    data: str = ""
    """Prompts with answers; empty: held out from data.train, at most a tenth of it."""
    prompts: int = 64
    """Prompts validated on."""
    greedy_tokens: int = 64
    """Longest greedy answer, in tokens."""


@dataclass(frozen=True)
class EvalConfig:
    prompts: int = 64
    """Prompts evaluated; 0: all."""
    max_prompt_length: int = 256
    """Longer prompts are left out of the evaluation."""
    max_reference_length: int = 256
    """Tokens of the longest reference that a model reads, end-of-sequence included."""
    overlong_references: str = "cut"
    """`cut` longer references where a model reads them, or `drop` the prompts from the evaluation."""
    samples: int = 2
    """Samples of the student per prompt for the reverse KL on its own text."""
    sample_tokens: int = 32
    """Longest such sample, in tokens."""
    temperature: float = 1.0
    """Sampling temperature of these samples; the objective is measured at 1."""
    greedy_tokens: int = 64
    """Longest greedy answer scored by ROUGE-L, in tokens."""
    batch_size: int = 64
    """Sequences decoded at once."""
    seed: int = 1234
    """Seed of prompts and uniforms: the same before and after training."""
    engine: str = "builtin"
    """What answers: `builtin`, our decoder, or `vllm` (section `engine`)."""


@dataclass(frozen=True)
class LogConfig:
    every: int = 1
    """Optimiser steps per log line."""
    trackers: str = ""
    """Where metrics go beside metrics.jsonl: names separated by commas that accelerate knows and that are installed,
    such as tensorboard,wandb,trackio."""
    samples: int = 4
    """Prompts whose answers are written to samples.jsonl at each evaluation."""
    checkpoint_every: int = 0
    """Optimiser steps per checkpoint, and one at the end of a stage; 0: only when a signal asks to stop."""
    checkpoints_kept: int = 2
    """Older ones are deleted."""


@dataclass(frozen=True)
class StageConfig:
    """One stage of training."""

    method: str = "minillm"
    """sft | kd | seqkd | gkd | minillm."""
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass(frozen=True)
class Route:
    """One of several teachers, by its name in `teachers`, and how it teaches its records."""

    model: str
    """Hub id, local directory, or `package:NAME`."""
    weight: float = 1.0
    """Multiplies loss.distill_weight."""
    divergence: str = ""
    """As loss.divergence; empty: that one."""
    beta: float | None = None
    """As loss.beta; none: that one."""


@dataclass(frozen=True)
class RunConfig:
    """What all stages of a run share."""

    output: str = ""
    """Run directory; empty: runs/NAME of the recipe."""
    seed: int = 0
    """Seed of data order, sampling and initialisation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, Any] = field(default_factory=dict)
    """kd and gkd: several teachers in the place of model.teacher, by the names in the column `teacher`, such as
    {math: {model: ORG/NAME, weight: 1.0, divergence: reverse_kl, beta: 0.5}}. `weight` multiplies
    loss.distill_weight; `divergence` and `beta` are those of `loss` where they are not given."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)
