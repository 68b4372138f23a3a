"""What must hold between the values of a configuration."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from minillm.config.engine import EngineConfig
from minillm.config.schema import ConfigError, OptimConfig, Route, RunConfig, StageConfig
from minillm.config.teacher import addresses, is_stored, wrong_settings, wrong_teacher
from minillm.files import flatten
from minillm_kernels.rows import DIVERGENCES

METHODS = ("sft", "kd", "seqkd", "gkd", "minillm")
ENGINES = ("builtin", "vllm")
DTYPES = ("float32", "bfloat16", "float16")
ROUNDING = ("adamw_stochastic", "adamw_kahan")
OPTIMIZERS = ("adamw", *ROUNDING, "adamw_8bit", "adamw_4bit", "bnb_adamw_8bit", "bnb_paged_adamw_8bit")
KEEP_UPDATES = (*ROUNDING, "adamw_8bit", "adamw_4bit")
"""Those under which weights of 16 bits keep updates below their spacing."""
MOVING = ("student", "ema")
"""Values of teacher.source whose teacher changes with every update."""
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
    one_of("eval.overlong_references", run.eval.overlong_references, ("cut", "drop"))
    one_of("eval.engine", run.eval.engine, ENGINES)
    _check_engine(run.engine)
    if run.eval.prompts < 0:
        raise ConfigError(f"eval.prompts is {run.eval.prompts}; give a number, or 0 for all")
    _check_parallel(run)
    one_of("lora.export", run.lora.export, ("merged", "adapter"))
    check_teacher(run)
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
    if parallel.teacher == "tensor" and model.head == "logits":
        raise ConfigError(
            "model.head logits forms whole rows of logits, and under parallel.teacher tensor the teacher's head is "
            "split over processes: set model.head to fused, or parallel.teacher to shard"
        )
    own = run.teachers or run.teacher.source != "checkpoint" or run.teacher.quantize or model.quantize
    if own and (parallel.student, parallel.teacher) != ("replicate", "replicate"):
        raise ConfigError(
            "quantised models, several teachers and a teacher of the student's own weights are held whole by every "
            "process: set parallel.student and parallel.teacher to replicate"
        )
    if parallel.teacher != "replicate" and (addresses(model.teacher) or is_stored(model.teacher)):
        raise ConfigError(
            f"parallel.teacher is {parallel.teacher}, but the teacher {model.teacher} is not loaded here: leave it out"
        )
    if parallel.student == "shard" and model.compute_dtype == "float16":
        raise ConfigError(
            "parallel.student shard does not compute in float16, whose loss scaling does not know shards: set "
            "model.compute_dtype to bfloat16 or float32"
        )


def check_teacher(run: RunConfig) -> None:
    """Refuse contradictions about whose weights the teacher has, and how they are held."""
    teacher, model = run.teacher, run.model
    one_of("teacher.source", teacher.source, ("checkpoint", "base", *MOVING))
    if wrong := wrong_settings(teacher):
        raise ConfigError(wrong)
    if run.teachers and (model.teacher or teacher.source != "checkpoint"):
        raise ConfigError("teachers and model.teacher (or teacher.source) both name teachers: keep one of them")
    routes(run)
    one_of("teacher.quantize", teacher.quantize, ("", "8bit", "4bit"))
    one_of("model.quantize", model.quantize, ("", "4bit"))
    if not 0 <= teacher.decay < 1:
        raise ConfigError(f"teacher.decay is {teacher.decay}; it lies in [0, 1)")
    if teacher.source != "checkpoint":
        given = {"model.teacher": model.teacher, "teacher.quantize": teacher.quantize}
        given["teacher.dtype"] = "" if teacher.dtype == "checkpoint" else teacher.dtype
        for key, value in given.items():
            if value:
                raise ConfigError(
                    f"teacher.source is {teacher.source}, the student's own weights, and {key} is {value}: keep one"
                )
    if teacher.source == "ema" and model.dtype != "float32" and not run.lora.rank:
        raise ConfigError(
            f"teacher.source is ema: an average of weights in {model.dtype} would not move: set model.dtype float32"
        )
    if run.lora.export == "adapter" and model.drop_layers is not None:
        raise ConfigError(
            "lora.export is adapter, and adapters of a student that was cut from its teacher have no base model that "
            "could be named: set lora.export to merged"
        )
    if model.quantize and model.drop_layers is not None:
        raise ConfigError("model.quantize is for a student that is loaded, and model.drop_layers cuts one: keep one")


def routes(run: RunConfig) -> dict[str, Route]:
    """The section `teachers`, each as what it says. Raises ConfigError for what is no teacher."""
    found = {}
    keys = [key.name for key in dataclasses.fields(Route)]
    for name, tree in run.teachers.items():
        where = f"teachers.{name}"
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), str):
            raise ConfigError(f"{where} is {tree!r}; expected {{model: ORG/NAME}}, with weight, divergence and beta")
        for key in tree:
            if key not in keys:
                raise ConfigError(unknown(f"key in `{where}`:", str(key), keys))
        found[name] = route = Route(**tree)
        if route.divergence:
            one_of(f"{where}.divergence", route.divergence, DIVERGENCES)
        for key, value, top in (("weight", route.weight, math.inf), ("beta", route.beta or 0.0, 1)):
            if not isinstance(value, (int, float)) or not 0 <= value <= top:
                raise ConfigError(f"{where}.{key} is {value!r}; it lies in [0, {top}]")
    return found


def check_seed(path: str, seed: int) -> None:
    """Raises ConfigError for a seed out of the range in which all the seeds derived from it have 64 bits."""
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"{path} is {seed}; a seed lies in [0, {MAX_SEED}]")


def check_stage(stage: StageConfig, run: RunConfig) -> None:
    """Refuse settings of a stage that contradict each other, the run or the method's mathematics."""
    _finite(stage)
    one_of("method", stage.method, METHODS)
    one_of("rollout.engine", stage.rollout.engine, ENGINES)
    here = not addresses(run.model.teacher) and {run.parallel.student, run.parallel.teacher} == {"replicate"}
    served = run.engine.url and (run.engine.teacher_url or stage.rollout.alpha == 0)
    if stage.rollout.overlap and not (here and (stage.rollout.engine == "builtin" or served)):
        raise ConfigError(
            "rollout.overlap samples in a thread of this process, by whole models that are here, or by servers: set "
            "it to 0, or the section parallel to replicate, with a teacher in this process, and rollout.engine to "
            "builtin, or to vllm with engine.url (and engine.teacher_url where the teacher is mixed in)"
        )
    if "vllm" in (stage.rollout.engine, run.eval.engine) and {run.parallel.student, run.parallel.teacher} != {
        "replicate"
    }:
        raise ConfigError(
            "an engine is given whole weights, which no process of a run in shards holds: set parallel.student and "
            "parallel.teacher to replicate, or rollout.engine and eval.engine to builtin"
        )
    one_of("loss.divergence", stage.loss.divergence, DIVERGENCES)
    one_of("optim.schedule", stage.optim.schedule, ("constant", "linear", "cosine"))
    one_of("data.overlong_answers", stage.data.overlong_answers, ("cut", "drop"))
    one_of("data.overlong_prompts", stage.data.overlong_prompts, ("error", "drop"))
    one_of("data.empty_answers", stage.data.empty_answers, ("error", "drop"))
    one_of("data.train_on", stage.data.train_on, ("last", "all"))
    one_of("data.rollout_turns", stage.data.rollout_turns, ("last", "all"))
    if stage.method == "gkd" and stage.data.rollout_turns == stage.data.train_on == "all":
        raise ConfigError(
            "data.rollout_turns is all, which makes every turn a record of its own, and data.train_on is all, which "
            "would learn them once more in each: set data.train_on to last"
        )
    _at_least_one(stage.data, "data", "max_prompt_length", "max_response_length")
    _at_least_one(stage.rollout, "rollout", "batch_size", "epochs")
    _check_limits(stage)
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
    if not model.teacher and model.drop_layers is not None:
        raise ConfigError("model.drop_layers needs model.teacher: a hub id, a directory or package:NAME")
    if run.teachers and stage.method not in ("sft", "kd", "gkd"):
        raise ConfigError(f"teachers are for kd and gkd; method {stage.method} has one, model.teacher")
    if not model.teacher and not run.teachers and run.teacher.source == "checkpoint" and stage.method != "sft":
        raise ConfigError(f"method {stage.method} needs model.teacher: a hub id, a directory or package:NAME")
    if run.teacher.source in MOVING and stage.method in ("minillm", "seqkd"):
        raise ConfigError(
            f"teacher.source is {run.teacher.source}, and {stage.method} learns from what the teacher said before the "
            "updates that move it: use gkd or kd, or the teacher.source base"
        )
    if not model.student and model.drop_layers is None:
        raise ConfigError("no student: set model.student, or model.drop_layers to cut it from the teacher")
    if model.student and model.drop_layers is not None:
        raise ConfigError("model.student and model.drop_layers are both set; keep one of them")
    if wrong := wrong_teacher(stage, run):
        raise ConfigError(wrong)
    if stage.objective.reward_scaling <= 0:
        raise ConfigError(f"objective.reward_scaling is {stage.objective.reward_scaling}; rewards are divided by it")
    if stage.rollout.on_policy_step and not 0 < stage.validation.every < stage.optim.steps:
        raise ConfigError("rollout.on_policy_step follows the validation loss: set validation.every below optim.steps")
    if stage.rollout.chunk_size < 0:
        raise ConfigError(f"rollout.chunk_size is {stage.rollout.chunk_size}; give a number, or 0 for all at once")
    if stage.rollout.cuda_graphs is True and stage.rollout.engine != "builtin":
        raise ConfigError(
            "rollout.cuda_graphs is true, which is for our own decoder, and rollout.engine is "
            f"{stage.rollout.engine}: set it to auto"
        )
    if stage.rollout.engine_correction < 0:
        raise ConfigError(
            f"rollout.engine_correction is {stage.rollout.engine_correction}; give the largest weight, or 0 for none"
        )
    if stage.method == "minillm":
        _check_minillm(stage)


def _check_engine(engine: EngineConfig) -> None:
    one_of("engine.push", engine.push, ("disk", "nccl", "ipc"))
    for key in ("url", "teacher_url"):
        parts = urlsplit(getattr(engine, key))
        if getattr(engine, key) and not (parts.scheme in ("http", "https") and parts.netloc):
            raise ConfigError(f"engine.{key} is {getattr(engine, key)!r}; expected one such as http://localhost:8000")
    for key in ("memory", "timeout"):
        if getattr(engine, key) <= 0:
            raise ConfigError(f"engine.{key} is {getattr(engine, key)}; it must be above 0")
    if engine.retries < 0:
        raise ConfigError(f"engine.retries is {engine.retries}; give a number, or 0 to give up at once")
    host, colon, port = engine.address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ConfigError(f"engine.address is {engine.address!r}; expected HOST:PORT, such as 10.0.0.1:29600")


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


def _check_limits(stage: StageConfig) -> None:
    given = stage.rollout.max_new_tokens
    if isinstance(given, int):
        _at_least_one(stage.rollout, "rollout", "max_new_tokens")
        return
    firsts, limits = [first for first, _ in given], [limit for _, limit in given]
    if not given or firsts[0] != 0 or firsts != sorted(set(firsts)) or min(limits) < 1:
        raise ConfigError(
            f"rollout.max_new_tokens is {[list(pair) for pair in given]}; give a number, or pairs of the steps "
            "done and the limit of at least 1 token from there on, the first for 0 steps: [[0, 64], [50, 256]]"
        )
    if stage.method == "seqkd":
        raise ConfigError(
            "rollout.max_new_tokens changes with the steps, but seqkd samples before the first: give one"
        )


def _check_minillm(stage: StageConfig) -> None:
    if stage.objective.reward and not re.fullmatch(r"[\w.]+:\w+", stage.objective.reward):
        raise ConfigError(
            f"objective.reward is {stage.objective.reward!r}; expected the import path of a function, "
            "package.module:function"
        )
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
    if stage.rollout.overlap not in (0, 1):
        raise ConfigError(f"rollout.overlap is {stage.rollout.overlap}; give 1 to sample one batch ahead, or 0")
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
