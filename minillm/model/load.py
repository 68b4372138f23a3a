"""Models: loading, cutting a student out of its teacher, and what must hold between the two and their tokenizers."""

import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minillm.config.schema import Config, ConfigError, Lora
from minillm.data import packages

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

PROBE = "In 1984,  the naïve café (№ 7) answered: “2 + 2 = 5”?\n\n\tdef f(x): return x\n日本語 🙂"


def load_model(source: str, dtype: str = "float32", attn: str = "auto") -> "PreTrainedModel":
    """An AutoModelForCausalLM from a hub id, a directory or `package:NAME`, in eval mode (no dropout). Code that comes
    with a model is never run, nor a pickle read.

    Raises ConfigError when nothing can be loaded from `source`.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            _locate(source),
            dtype=getattr(torch, dtype),
            attn_implementation=attention(attn, dtype),
            trust_remote_code=False,
            use_safetensors=True,
        ).eval()
    except ImportError as error:
        raise ConfigError(f"model.attn {attn} cannot be had here: {error}. Set it to auto") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"no causal language model could be loaded from {source!r}: {error}") from error


def skeleton(source: str, dtype: str = "float32", attn: str = "auto") -> "PreTrainedModel":
    """The same model with its weights not read: random, or absent under `torch.device("meta")`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(_locate(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no model is described at {source!r}: {error}") from error
    chosen = attention(attn, dtype)
    settings = {} if chosen is None else {"attn_implementation": chosen}  # a None given here would mean eager
    return AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), trust_remote_code=False, **settings
    ).eval()


def attention(wanted: str, dtype: str) -> str | None:
    """The attention to ask transformers for; None leaves it the choice (sdpa, where the model has it)."""
    from transformers.utils import is_flash_attn_2_available

    if wanted != "auto":
        return wanted
    return "flash_attention_2" if dtype != "float32" and is_flash_attn_2_available() else None


def load_tokenizer(source: str) -> "PreTrainedTokenizerBase":
    """The tokenizer that travels with a model; it must name an end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(_locate(source), trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:  # ImportError: its kind needs a package that is missing
        raise ConfigError(f"no tokenizer could be loaded from {source!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {source!r} has no end-of-sequence token, so no response would ever end")
    return tokenizer


def load_student(
    config: Config, teacher: "PreTrainedModel | None", load: "Callable[[str, str, str], PreTrainedModel]" = load_model
) -> "PreTrainedModel":
    """The student named in the config, or the one cut from `teacher` by `model.drop_layers`; with adapters, where the
    config wants them."""
    settings = config.model
    if settings.student:
        student = load(settings.student, settings.dtype, settings.attn)
    else:
        assert settings.drop_layers is not None  # config.check
        if teacher is None:
            teacher = load(settings.teacher, settings.dtype, settings.attn)
        student = drop_layers(teacher, *settings.drop_layers)
    if config.lora.rank:
        add_adapters(student, config.lora, config.seed)
    if settings.recompute:
        recompute_layers(student)
    return student


def recompute_layers(model: "PreTrainedModel") -> None:
    """Activation checkpointing of every layer, in place. The one of transformers wants a model in training mode, which
    would switch dropout on."""
    for layer in layers_of(model)[1]:
        layer.forward = functools.partial(_recomputed, layer.forward)


def _recomputed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():  # rollouts, with their caches
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def layers_of(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """The list of layers and its name below the base model."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.ModuleList):
            return name, module
    raise ConfigError(f"{type(model).__name__} has no list of layers to cut a student from, or to recompute")


def adapters_unavailable() -> str | None:
    """Why adapters cannot be had here, or None: the installed transformers asks for a peft that is new enough."""
    try:
        import peft
        from packaging.version import Version
        from transformers.integrations.peft import MIN_PEFT_VERSION
    except ImportError:
        return 'lora.rank needs peft: pip install "minillm-kernels[lora]"'
    if Version(peft.__version__) >= Version(MIN_PEFT_VERSION):
        return None
    return (
        f"lora.rank: the installed transformers wants peft {MIN_PEFT_VERSION} or later, not {peft.__version__}: "
        f'pip install "peft>={MIN_PEFT_VERSION}", or an older transformers'
    )


def add_adapters(model: "PreTrainedModel", lora: Lora, seed: int) -> None:
    """LoRA in place: its own weights are trained, all others frozen.

    The head is read apart from the model (minillm/model/head.py), so an adapter there would be passed over.
    """
    why = adapters_unavailable()
    if why:
        raise ConfigError(why)
    from peft import LoraConfig

    torch.manual_seed(seed)
    targets = lora.targets if lora.targets == "all-linear" else [name.strip() for name in lora.targets.split(",")]
    head = model.get_output_embeddings()
    try:
        model.add_adapter(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
        )
    except ValueError as error:
        raise ConfigError(f"lora.targets {lora.targets}: {error}") from error
    if model.get_output_embeddings() is not head or model.get_input_embeddings().__module__.startswith("peft"):
        raise ConfigError(f"lora.targets {lora.targets} reaches the embeddings or the head; name other modules")
    model.eval()


def merge_adapters(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of the model with its adapters added to the weights; the model itself where it has none."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            merged.set_submodule(name, module.get_base_layer())
    merged._hf_peft_config_loaded = False
    del merged.peft_config
    return merged.requires_grad_(True)


def drop_layers(teacher: "PreTrainedModel", first: int, last: int) -> "PreTrainedModel":
    """A copy of `teacher` without its decoder layers first … last-1.

    A contiguous block from the middle is what a residual network misses least: the layers kept still see nearly the
    inputs they were trained on.
    """
    name, layers = layers_of(teacher)
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


def cached(module: nn.Module, cache: "Cache") -> dict[str, Any]:
    """What a forward of a transformers module is called with to go on from `cache` and to add to it."""
    names = inspect.signature(module.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}  # renamed by transformers


@torch.no_grad()
def check_packing(model: "PreTrainedModel") -> None:
    """Refuse data.packing where the model lets one sequence of a row see another: tried, not looked up."""
    ids = torch.tensor([[1, 2, 3, 4, 5]], device=model.device)
    positions = torch.tensor([[0, 1, 0, 1, 2]], device=model.device)
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 2:]
    alone = model(input_ids=ids[:, 2:], use_cache=False).logits
    if not torch.allclose(packed.float(), alone.float(), rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"{type(model).__name__} does not keep packed sequences apart: set data.packing to false, or model.attn "
            "to sdpa"
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
