"""Configuration: one flat frozen dataclass per concern, read from YAML, overridden by flags, checked before any work.

A *config* describes one training run; a *recipe* is a config with `stages:`, each a set of overrides run in order on
the same student, and optionally `smoke:`, overrides that make the whole recipe short. Precedence, lowest first:
defaults, recipe, its stage, its smoke overrides, flags (`--optim.lr=1e-5`, or for one stage
`--stages.minillm.optim.lr=1e-5`).
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

METHODS = ("sft", "kd", "minillm")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key, what was expected and what to do."""


@dataclass(frozen=True)
class Model:
    teacher: str = ""
    """Hub id, local directory, or `package:NAME` (minillm/packages.py lists the names)."""
    student: str = ""
    """The same; empty: cut from the teacher by `drop_layers`."""
    drop_layers: tuple[int, int] | None = None
    """Half-open block [first, last) of teacher layers that the cut student does without."""
    dtype: str = "float32"
    """Dtype in which both models are loaded."""
    head: str = "fused"
    """`fused`: losses read final states and head weights, no logits; `logits`: the models' own logits, for a model
    whose head cannot be read."""


@dataclass(frozen=True)
class Data:
    train: str = ""
    """Prompts, with answers for sft and kd: a JSONL file or `package:NAME`."""
    text: str = ""
    """Plain text of the language-modelling loss L_PT: a .txt or JSONL file (key `text`) or `package:NAME`."""
    eval: str = ""
    """Held-out prompts with reference answers: a JSONL file or `package:NAME`; empty: no evaluation."""
    prompt_template: str = "chat"
    """`chat`: the tokenizer's chat template; otherwise a text that contains {prompt}."""
    max_prompt_length: int = 256
    """Tokens of the longest prompt accepted."""
    max_response_length: int = 256
    """Tokens after which a reference answer is cut."""
    overlong_prompts: str = "error"
    """`error`, or `drop` to leave prompts longer than the limit out."""


@dataclass(frozen=True)
class Rollout:
    batch_size: int = 32
    """Prompts rolled out at once, over all processes."""
    max_new_tokens: int = 256
    """Longest response sampled, in tokens."""
    alpha: float = 0.2
    """Weight of the teacher in the sampling mixture; 0 samples from the student alone."""
    temperature: float = 1.0
    """Sampling temperature; MiniLLM requires 1."""
    top_k: int = 0
    """Keep the k most likely tokens, 0 for all; MiniLLM requires 0."""
    top_p: float = 1.0
    """Nucleus mass, 1 for all; MiniLLM requires 1."""
    epochs: int = 4
    """Passes over each batch of rollouts before the next is sampled."""


@dataclass(frozen=True)
class Objective:
    """MiniLLM's objective; each strategy of the paper can be switched off alone."""

    variant: str = "paper"
    """`paper`: the formulas as printed."""
    single_step: bool = True
    """Single-step term, exact over the vocabulary; off: the return includes the current reward instead."""
    importance_weights: bool = True
    """Weigh tokens by student / mixture probability, as sampling from the mixture demands."""
    length_norm: bool = True
    """Mean rather than sum of the future rewards."""
    clip_range: float = 0.2
    """PPO clipping of the policy ratio; 0: no clipping."""
    pt_weight: float = 1.0
    """Weight of the language-modelling loss on `data.text`; 0: none."""
    pt_batch_size: int = 8
    """Text chunks per optimiser step."""
    pt_length: int = 256
    """Tokens per text chunk."""


@dataclass(frozen=True)
class Loss:
    """The word-level loss of kd: distill_weight · divergence + label_weight · cross entropy."""

    divergence: str = "forward_kl"
    """reverse_kl | forward_kl | jsd | skew_forward_kl | skew_reverse_kl | tvd."""
    beta: float = 0.5
    """Parameter of jsd and of the skew divergences."""
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
class Eval:
    prompts: int = 64
    """Prompts evaluated."""
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
    samples: int = 4
    """Prompts whose answers are written to samples.jsonl at each evaluation."""
    checkpoint_every: int = 0
    """Optimiser steps per checkpoint; 0: none."""


@dataclass(frozen=True)
class Config:
    method: str = "minillm"
    """sft | kd | minillm."""
    output: str = ""
    """Run directory; empty: runs/NAME of the recipe."""
    seed: int = 0
    """Seed of data order, sampling and initialisation."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    rollout: Rollout = field(default_factory=Rollout)
    objective: Objective = field(default_factory=Objective)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    eval: Eval = field(default_factory=Eval)
    log: Log = field(default_factory=Log)


@dataclass(frozen=True)
class Recipe:
    """Named stages of one run, in order; a plain config is a recipe of one stage."""

    name: str
    stages: dict[str, Config]

    @property
    def first(self) -> Config:
        return next(iter(self.stages.values()))

    def to_dict(self) -> dict[str, Any]:
        """Everything resolved, in the form that `load_recipe` reads."""
        return json.loads(json.dumps({"stages": {k: dataclasses.asdict(stage) for k, stage in self.stages.items()}}))

    def digest(self) -> str:
        """Hash of everything resolved but the output directory: two runs with one digest ran the same thing."""
        tree = self.to_dict()
        for stage in tree["stages"].values():
            del stage["output"]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def load_recipe(path: str | Path, flags: Sequence[str] = (), smoke: bool = False) -> Recipe:
    """Read a YAML recipe or config, apply `--section.key=value` flags, check every stage.

    Raises ConfigError for anything unknown, mistyped or contradictory, FileNotFoundError for a missing file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}: give the path of a YAML file, such as recipes/smollm2-cpu.yaml")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; expected sections such as `model:` and `optim:`")
    layers = [tree]
    if smoke:
        if not isinstance(tree.get("smoke"), dict):
            raise ConfigError(f"{path} has no `smoke:` section, which --smoke would apply")
        layers.append(tree["smoke"])
    layers.append(parse_flags(flags))
    stage_names = list(tree.get("stages") or {tree.get("method", Config.method): {}})
    for layer in layers[1:]:
        for name in layer.get("stages") or {}:
            if name not in stage_names:
                raise ConfigError(_unknown("stage", name, stage_names))
    stages = {}
    for name in stage_names:
        merged: dict[str, Any] = {}
        for layer in layers:
            _merge(merged, {k: v for k, v in layer.items() if k not in ("stages", "smoke")})
            _merge(merged, (layer.get("stages") or {}).get(name) or {})
        stages[name] = config_from(merged)
        check(stages[name])
    return Recipe(path.stem, stages)


def config_from(tree: Mapping[str, Any]) -> Config:
    """A Config from nested mappings; an unknown section or key, or a wrong type, is a ConfigError."""
    return _build(Config, tree, "")


def check(config: Config) -> None:
    """Refuse settings that contradict each other or the method's mathematics."""
    _one_of("method", config.method, METHODS)
    _one_of("loss.divergence", config.loss.divergence, DIVERGENCES)
    _one_of("optim.schedule", config.optim.schedule, ("constant", "linear", "cosine"))
    _one_of("data.overlong_prompts", config.data.overlong_prompts, ("error", "drop"))
    _one_of("objective.variant", config.objective.variant, ("paper",))
    _one_of("model.head", config.model.head, ("fused", "logits"))
    _one_of("model.dtype", config.model.dtype, ("float32", "bfloat16", "float16"))
    for section, key in (
        ("rollout", "batch_size"),
        ("rollout", "max_new_tokens"),
        ("rollout", "epochs"),
        ("objective", "pt_batch_size"),
        ("optim", "steps"),
        ("optim", "batch_size"),
        ("optim", "micro_batch_size"),
        ("data", "max_prompt_length"),
        ("data", "max_response_length"),
        ("eval", "prompts"),
        ("eval", "samples"),
        ("eval", "max_new_tokens"),
        ("eval", "rouge_new_tokens"),
        ("eval", "batch_size"),
        ("log", "every"),
    ):
        value = getattr(getattr(config, section), key)
        if value < 1:
            raise ConfigError(f"{section}.{key} is {value}; it must be at least 1")
    if not config.data.train:
        raise ConfigError("data.train is empty: name a JSONL file or package:NAME to train on")
    if not config.model.teacher and (config.method != "sft" or config.model.drop_layers is not None):
        needs = "model.drop_layers" if config.model.drop_layers is not None else f"method {config.method}"
        raise ConfigError(f"{needs} needs model.teacher: a hub id, a directory or package:NAME")
    if not config.model.student and config.model.drop_layers is None:
        raise ConfigError("no student: set model.student, or model.drop_layers to cut it from the teacher")
    if config.model.student and config.model.drop_layers is not None:
        raise ConfigError("model.student and model.drop_layers are both set; keep one of them")
    if not 0 <= config.rollout.alpha <= 1:
        raise ConfigError(f"rollout.alpha is {config.rollout.alpha}; a mixture weight lies in [0, 1]")
    if config.data.prompt_template != "chat" and "{prompt}" not in config.data.prompt_template:
        raise ConfigError("data.prompt_template must be `chat` or contain {prompt}")
    if config.method == "minillm":
        _check_minillm(config)


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


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """`["--optim.lr=1e-5"]` → `{"optim": {"lr": "1e-5"}}`; values stay text until their field's type is known."""
    tree: dict[str, Any] = {}
    for flag in flags:
        name, equals, value = flag.partition("=")
        if not name.startswith("--") or not equals:
            raise ConfigError(f"cannot read {flag!r}; overrides are written --section.key=value")
        node = tree
        *parents, leaf = name[2:].split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def save(recipe: Recipe, path: Path) -> None:
    """Write everything resolved, so that the run can be read and repeated without its flags."""
    path.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))


def _build(cls: type, tree: Any, path: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"`{path}` is {tree!r}; it is a section: expected keys below it")
    kinds = get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in kinds:
            raise ConfigError(
                _unknown(f"key in section `{path}`" if path else "section or key", str(key), list(kinds))
            )
        is_section = dataclasses.is_dataclass(kinds[key])
        values[key] = _build(kinds[key], value, where) if is_section else _coerce(value, kinds[key], where)
    return cls(**values)


def _coerce(value: Any, kind: Any, path: str) -> Any:
    """`value` as `kind`. Text is parsed: flags are text, and YAML 1.1 reads 1e-5 as text."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # T | None
        if value is None or value in ("none", "null"):
            return None
        return _coerce(value, args[0], path)
    parsed = yaml.safe_load(value) if isinstance(value, str) and kind is not str else value
    if origin is tuple:
        if isinstance(parsed, (list, tuple)) and len(parsed) == len(args):
            return tuple(_coerce(item, arg, path) for item, arg in zip(parsed, args, strict=True))
        raise ConfigError(f"{path} is {value!r}; expected a list of {len(args)} values")
    if kind is float and not isinstance(parsed, bool):
        try:
            return float(parsed)
        except (TypeError, ValueError):
            pass
    elif type(parsed) is kind:
        return parsed
    raise ConfigError(f"{path} is {value!r}; expected {kind.__name__}")


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _one_of(path: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(_unknown(f"value of {path}:", value, allowed))


def _unknown(what: str, name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {what} {name!r}; {hint}(known: {', '.join(allowed)})"
