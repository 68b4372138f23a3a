"""Models: loading, cutting a student out of its teacher, and what must hold between the two and their tokenizers."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from minillm import packages
from minillm.config import Config, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE = "In 1984,  the naïve café (№ 7) answered: “2 + 2 = 5”?\n\n\tdef f(x): return x\n日本語 🙂"


def load_model(source: str, dtype: str = "float32") -> "PreTrainedModel":
    """An AutoModelForCausalLM from a hub id, a directory or `package:NAME`, in eval mode (no dropout).

    Raises ConfigError when nothing can be loaded from `source`.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(_locate(source), dtype=getattr(torch, dtype)).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"no causal language model could be loaded from {source!r}: {error}") from error


def load_tokenizer(source: str) -> "PreTrainedTokenizerBase":
    """The tokenizer that travels with a model; it must name an end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(_locate(source))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer could be loaded from {source!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {source!r} has no end-of-sequence token, so no response would ever end")
    return tokenizer


def load_student(config: Config, teacher: "PreTrainedModel | None") -> "PreTrainedModel":
    """The student named in the config, or the one cut from `teacher` by `model.drop_layers`."""
    if config.model.student:
        return load_model(config.model.student, config.model.dtype)
    assert config.model.drop_layers is not None  # config.check
    if teacher is None:
        teacher = load_model(config.model.teacher, config.model.dtype)
    return drop_layers(teacher, *config.model.drop_layers)


def drop_layers(teacher: "PreTrainedModel", first: int, last: int) -> "PreTrainedModel":
    """A copy of `teacher` without its decoder layers first … last-1.

    A contiguous block from the middle is what a residual network misses least: the layers kept still see nearly the
    inputs they were trained on.
    """
    base = teacher.base_model
    name, layers = next(((n, m) for n, m in base.named_children() if isinstance(m, nn.ModuleList)), ("", None))
    if layers is None:
        raise ConfigError(f"{type(teacher).__name__} has no list of layers to cut a student from; set model.student")
    if not 0 <= first < last <= len(layers) or last - first == len(layers):
        raise ConfigError(
            f"model.drop_layers is [{first}, {last}); the teacher has layers [0, {len(layers)}), and some must stay"
        )
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers) - (last - first)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:first] + config.layer_types[last:]
    student = type(teacher)._from_config(config, dtype=teacher.dtype)
    kept = [i for i in range(len(layers)) if not first <= i < last]
    block = f"{teacher.base_model_prefix}.{name}."
    weights = {}
    for key, value in teacher.state_dict().items():
        if key.startswith(block):
            layer, _, rest = key.removeprefix(block).partition(".")
            if int(layer) not in kept:
                continue
            key = f"{block}{kept.index(int(layer))}.{rest}"
        weights[key] = value
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def check_context(model: "PreTrainedModel", tokens: int) -> None:
    """Refuse sequences longer than the model has positions for."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"prompt and answer may reach {tokens} tokens, but {type(model).__name__} has {limit} positions: lower "
            "data.max_prompt_length, data.max_response_length or rollout.max_new_tokens"
        )


def check_same_tokenizer(student: "PreTrainedTokenizerBase", teacher: "PreTrainedTokenizerBase") -> None:
    """Refuse two tokenizers that differ: reverse KL compares the models token by token.

    Raises ConfigError that says what differs.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = {token for token, i in ours.items() if theirs.get(token) != i} | (theirs.keys() - ours.keys())
        shown = ", ".join(repr(token) for token in sorted(differing)[:5])
        reason = f"{len(differing)} tokens differ ({len(ours)} against {len(theirs)} entries), such as {shown}"
    elif student.eos_token_id != teacher.eos_token_id:
        reason = f"the end-of-sequence tokens are {student.eos_token!r} and {teacher.eos_token!r}"
    elif (a := student.encode(PROBE)) != (b := teacher.encode(PROBE)):
        reason = f"the vocabularies agree, but one text gives {len(a)} and {len(b)} tokens that are not the same"
    else:
        return
    raise ConfigError(
        f"teacher and student have different tokenizers: {reason}. Token-level distillation needs one tokenizer; "
        "choose a student of the teacher's family, or cut one from it with model.drop_layers"
    )


def _locate(source: str) -> str | Path:
    if source.startswith(packages.PREFIX):
        return packages.model_directory(source.removeprefix(packages.PREFIX))
    return source
