"""What must hold between the values of a configuration."""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from minillm.config.schema import ConfigError, OptimConfig, RunConfig, StageConfig
from minillm.files import flatten
from minillm_kernels.rows import DIVERGENCES

METHODS = ("sft", "kd", "seqkd", "gkd", "minillm")
DTYPES = ("float32", "bfloat16", "float16")
ROUNDING = ("adamw_stochastic", "adamw_kahan")
OPTIMIZERS = ("adamw", *ROUNDING, "adamw_8bit", "adamw_4bit", "bnb_adamw_8bit", "bnb_paged_adamw_8bit")
KEEP_UPDATES = (*ROUNDING, "adamw_8bit", "adamw_4bit")
"""Those under which weights of 16 bits keep updates below their spacing."""
MAX_SEED = 2**42  # the rollouts of a step draw from the seed 1_000_003 · seed + step, which has 63 bits
OF_TEMPLATE = (
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
"""Arguments of apply_chat_template that no template reads, or that minillm sets."""


def check_run(run: RunConfig) -> None:
    """Refuse settings of a run that contradict each other; enough for evaluation, of any model."""
    _finite(run)
    one_of("model.head", run.model.head, ("fused", "logits"))
    one_of("model.dtype", run.model.dtype, DTYPES)
    one_of("model.compute_dtype", run.model.compute_dtype, ("auto", *DTYPES))
    one_of("teacher.dtype", run.teacher.dtype, ("checkpoint", *DTYPES))
    _at_least_one(run.eval, "eval", "samples", "sample_tokens", "greedy_tokens", "batch_size", "max_prompt_length")
    _at_least_one(run.log, "log", "every", "checkpoints_kept")
    if run.eval.prompts < 0:
        raise ConfigError(f"eval.prompts is {run.eval.prompts}; give a number, or 0 for all")
    _check_parallel(run)
    if run.lora.rank < 0:
        raise ConfigError(f"lora.rank is {run.lora.rank}; give a rank, or 0 for no adapters")
    check_seed("seed", run.seed)
    check_seed("eval.seed", run.eval.seed)
    template = run.data.prompt_template
    if template not in ("chat", "alpaca") and "{prompt}" not in template:
        raise ConfigError("data.prompt_template must be `chat`, `alpaca` or a text that contains {prompt}")
    if run.data.chat_template_kwargs and template != "chat":
        raise ConfigError(f"data.chat_template_kwargs are for data.prompt_template chat; it is {template!r}")
    ours = [key for key in run.data.chat_template_kwargs if key in OF_TEMPLATE]
    if ours:
        raise ConfigError(f"data.chat_template_kwargs.{ours[0]} is set by minillm itself: leave it out")


def _check_parallel(run: RunConfig) -> None:
    parallel, model = run.parallel, run.model
    one_of("parallel.student", parallel.student, ("replicate", "shard"))
    one_of("parallel.teacher", parallel.teacher, ("replicate", "shard", "tensor", "offload"))
    _at_least_one(parallel, "parallel", "hosts")
    if parallel.teacher != "replicate" and not model.teacher:
        raise ConfigError(f"parallel.teacher is {parallel.teacher}, but there is no model.teacher: leave it out")
    if parallel.hosts > 1 and parallel.student == parallel.teacher == "replicate":
        raise ConfigError(
            f"parallel.hosts is {parallel.hosts}, but nothing is sharded: leave it out, or set parallel.student or "
            "parallel.teacher"
        )
    if parallel.teacher == "tensor" and parallel.hosts > 1:
        raise ConfigError(
            f"parallel.hosts is {parallel.hosts}, but a teacher under parallel.teacher tensor is cut over all "
            "processes of the run: use one host, or set parallel.teacher to shard"
        )
    if parallel.teacher == "tensor" and model.drop_layers is not None:
        raise ConfigError(
            "model.drop_layers cuts the student from a whole teacher, and parallel.teacher tensor holds none: save "
            "the cut student first and name it in model.student, or set parallel.teacher to shard"
        )
    if parallel.student == "shard" and model.compute_dtype == "float16":
        raise ConfigError(
            "parallel.student shard does not compute in float16, whose loss scaling does not know shards: set "
            "model.compute_dtype to bfloat16 or float32"
        )


def check_seed(path: str, seed: int) -> None:
    """Raises ConfigError for a seed out of the range in which all the seeds derived from it have 64 bits."""
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"{path} is {seed}; a seed lies in [0, {MAX_SEED}]")


def check_stage(stage: StageConfig, run: RunConfig) -> None:
    """Refuse settings of a stage that contradict each other, the run or the method's mathematics."""
    _finite(stage)
    one_of("method", stage.method, METHODS)
    one_of("loss.divergence", stage.loss.divergence, DIVERGENCES)
    one_of("optim.schedule", stage.optim.schedule, ("constant", "linear", "cosine"))
    one_of("data.overlong_prompts", stage.data.overlong_prompts, ("error", "drop"))
    one_of("data.empty_answers", stage.data.empty_answers, ("error", "drop"))
    one_of("data.train_on", stage.data.train_on, ("last", "all"))
    _at_least_one(stage.data, "data", "max_prompt_length", "max_response_length")
    _at_least_one(stage.rollout, "rollout", "batch_size", "max_new_tokens", "epochs")
    _at_least_one(stage.objective, "objective", "pt_batch_size")
    _at_least_one(stage.optim, "optim", "steps", "batch_size", "micro_batch_size")
    _at_least_one(stage.validation, "validation", "prompts", "greedy_tokens")
    _check_optim(stage.optim)
    _between_zero_and_one(stage.rollout, "rollout", "alpha", "on_policy", "on_policy_step")
    _between_zero_and_one(stage.loss, "loss", "beta")
    _between_zero_and_one(stage.objective, "objective", "pt_teacher", "discount")
    if not stage.data.train:
        raise ConfigError("data.train is empty: name a JSONL file or package:NAME to train on")
    model = run.model
    one_of("optim.optimizer", stage.optim.optimizer, OPTIMIZERS)
    _check_weights(stage, run)
    if run.parallel.student == "shard" and stage.optim.optimizer != "adamw":
        raise ConfigError(
            f"optim.optimizer is {stage.optim.optimizer}; parallel.student shard trains by adamw alone, whose state "
            "is sharded with the weights"
        )
    if not model.teacher and (stage.method != "sft" or model.drop_layers is not None):
        needs = "model.drop_layers" if model.drop_layers is not None else f"method {stage.method}"
        raise ConfigError(f"{needs} needs model.teacher: a hub id, a directory or package:NAME")
    if not model.student and model.drop_layers is None:
        raise ConfigError("no student: set model.student, or model.drop_layers to cut it from the teacher")
    if model.student and model.drop_layers is not None:
        raise ConfigError("model.student and model.drop_layers are both set; keep one of them")
    if stage.objective.reward_scaling <= 0:
        raise ConfigError(f"objective.reward_scaling is {stage.objective.reward_scaling}; rewards are divided by it")
    if stage.rollout.on_policy_step and not 0 < stage.validation.every < stage.optim.steps:
        raise ConfigError("rollout.on_policy_step follows the validation loss: set validation.every below optim.steps")
    if stage.rollout.chunk_size < 0:
        raise ConfigError(f"rollout.chunk_size is {stage.rollout.chunk_size}; give a number, or 0 for all at once")
    if stage.method == "minillm":
        _check_minillm(stage)


def _finite(section: Any) -> None:
    """Refuse .nan and .inf, whatever they are given for."""
    for path, value in flatten(dataclasses.asdict(section)):
        if not all(map(math.isfinite, _floats(value))):
            raise ConfigError(f"{path} is {value}; expected a finite number")


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _floats(item)
    elif isinstance(value, dict):
        yield from _floats(list(value.values()))
    elif isinstance(value, float):
        yield value


def _check_optim(optim: OptimConfig) -> None:
    for key in ("lr", "weight_decay", "warmup_steps"):
        if getattr(optim, key) < 0:
            raise ConfigError(f"optim.{key} is {getattr(optim, key)}; it must be at least 0")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"optim.betas is {list(optim.betas)}; both lie in [0, 1)")
    if optim.max_grad_norm <= 0:
        raise ConfigError(f"optim.max_grad_norm is {optim.max_grad_norm}; it must be above 0")


def _check_weights(stage: StageConfig, run: RunConfig) -> None:
    dtype, optimizer = run.model.dtype, stage.optim.optimizer
    rounds = dtype == "bfloat16" and not run.lora.rank
    if dtype == "float16" or (rounds and optimizer not in KEEP_UPDATES):
        raise ConfigError(
            f"model.dtype is {dtype}: trained weights of 16 bits lose most updates to rounding. Keep them in float32 "
            "and compute in 16 bits (model.dtype float32, model.compute_dtype bfloat16), or, short of memory, train "
            f"bfloat16 weights by an optim.optimizer that keeps small updates: {', '.join(KEEP_UPDATES)}"
        )
    if optimizer in ROUNDING and not rounds:
        what = "adapters, which are float32" if run.lora.rank else f"model.dtype {dtype}"
        raise ConfigError(f"optim.optimizer {optimizer} is for weights trained in bfloat16, not for {what}: use adamw")
    if dtype != "float32" and run.model.compute_dtype not in ("auto", dtype):
        raise ConfigError(
            f"model.compute_dtype is {run.model.compute_dtype}, but weights in {dtype} compute in {dtype}: set "
            "model.dtype to float32, or leave model.compute_dtype out"
        )


def _at_least_one(section: Any, name: str, *keys: str) -> None:
    for key in keys:
        if getattr(section, key) < 1:
            raise ConfigError(f"{name}.{key} is {getattr(section, key)}; it must be at least 1")


def _between_zero_and_one(section: Any, name: str, *keys: str) -> None:
    for key in keys:
        if not 0 <= getattr(section, key) <= 1:
            raise ConfigError(f"{name}.{key} is {getattr(section, key)}; it lies in [0, 1]")


def _check_minillm(stage: StageConfig) -> None:
    # Filtered or tempered log-probs are -inf or another law for the other model's tokens, so the importance weights
    # and rewards of the method exist only for the plain softmax of both models.
    for key, needed in (("temperature", 1), ("top_k", 0), ("top_p", 1)):
        value = getattr(stage.rollout, key)
        if value != needed:
            raise ConfigError(f"rollout.{key} is {value}; MiniLLM's importance weights need {needed}")
    if stage.loss.temperature != 1:
        raise ConfigError(f"loss.temperature is {stage.loss.temperature}; MiniLLM's rewards are defined at 1")
    if stage.objective.importance_weights and stage.rollout.alpha == 1:
        raise ConfigError("rollout.alpha is 1: the student is never sampled and importance weights are unbounded")
    coins = stage.rollout.coins
    if coins != "row" and coins < 1:
        raise ConfigError(f"rollout.coins is {coins}; give the number of groups that share coins, or row")
    if stage.rollout.batch_size % stage.optim.batch_size:
        raise ConfigError(
            f"rollout.batch_size {stage.rollout.batch_size} is not a multiple of optim.batch_size "
            f"{stage.optim.batch_size}: every pass over the rollouts must use each of them once"
        )
    if stage.objective.pt_weight > 0 and not stage.data.text:
        raise ConfigError(
            "objective.pt_weight is above 0 but data.text is empty: name the text, or set the weight to 0"
        )
    if stage.objective.pt_weight > 0 and stage.objective.pt_length < 2:
        raise ConfigError(f"objective.pt_length is {stage.objective.pt_length}; a text chunk needs at least 2 tokens")


def one_of(path: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(unknown(f"value of {path}:", str(value), allowed))


def unknown(what: str, name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {what} {name!r}; {hint}(known: {', '.join(allowed)})"
