"""Models and tokenizers, loaded from a hub, a directory or a package."""

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minillm.config.schema import ConfigError, EvalDataConfig, RunConfig
from minillm.config.teacher import addresses, is_stored
from minillm.data import packages
from minillm.data.prompts import answer_end
from minillm.foreign import foreign
from minillm.model.adapters import StoredAdapters, add_adapters, continue_adapters, merge_adapters, stored_adapters
from minillm.model.bounds import bounded, check_layers, room
from minillm.model.files import check_generation_config, check_weight_names, damaged, stored_shapes, weights_folder
from minillm.model.layers import drop_layers, recompute_layers
from minillm.model.quantised import quantisation

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    source: str,
    dtype: str = "float32",
    attn: str = "auto",
    quantization_config: Any = None,
) -> "PreTrainedModel":
    """An AutoModelForCausalLM from a hub id, a directory or `package:NAME`, in eval mode (no dropout). Code that comes
    with a model is never run, nor a pickle read. `dtype` "checkpoint" is the one in which it is stored. Under a
    `quantization_config` of transformers (minillm/model/quantised.py) its matrices are rounded as they are read.

    A directory of adapters is loaded as its base model with the adapters merged.

    Raises ConfigError when nothing can be loaded from `source`, or not all of it.
    """
    from transformers import AutoModelForCausalLM

    if adapters := _adapters(source):
        if quantization_config is not None:
            raise ConfigError(f"{source!r} holds adapters, to be merged before anything is rounded: export it merged")
        model = load_model(adapters.base, dtype, attn)
        continue_adapters(model, adapters)
        return merge_adapters(model)

    place, config = _locate(source), _description(source)
    check_generation_config(place)
    chosen = _stored_dtype(config) if dtype == "checkpoint" else getattr(torch, dtype)
    quantised = hasattr(config, "quantization_config")
    if quantised and quantization_config is not None:
        raise ConfigError(f"{source!r} is stored in fewer bits already: leave quantize out")
    more = {} if quantization_config is None else {"quantization_config": quantization_config}
    packed = 8 if quantised or more else 1  # weights of 16 bits in 2, at the least
    with (
        _reading(f"no causal language model could be loaded from {source!r}", source),
        bounded(source, packed * room()),
    ):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=chosen,
                attn_implementation=attention(attn, chosen),
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with their names
                **more,
            )
        except ImportError as error:
            cause = (
                "its weights are quantised and need that library" if quantised else f"model.attn is {attn}: try auto"
            )
            raise ConfigError(f"{source!r} cannot be loaded here: {error} ({cause})") from error
    model, report = loaded
    for name, stored, described in sorted(report["mismatched_keys"]):
        raise ConfigError(
            f"{source!r}: its files hold {name} with the shape {list(stored)}, and its config.json describes "
            f"{list(described)}: they do not belong together; get the whole model"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"{source!r} is incomplete: its files hold no weights for {len(missing)} tensors, such as "
            f"{', '.join(missing[:3])}. They would be drawn at random; get the whole model"
        )
    return model.eval()


def skeleton(
    source: str, dtype: str = "float32", attn: str = "auto", quantization_config: Any = None
) -> "PreTrainedModel":
    """The same model with its weights not read: random, or absent under `torch.device("meta")`; never rounded."""
    from transformers import AutoModelForCausalLM

    config = _description(source)
    chosen = _stored_dtype(config) if dtype == "checkpoint" else getattr(torch, dtype)
    how = attention(attn, chosen)
    settings = {} if how is None else {"attn_implementation": how}  # a None given here would mean eager
    with _reading(f"no model can be made from the configuration of {source!r}", source), bounded(source):
        return AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False, **settings).eval()


def unread_model(source: str, dtype: str, attn: str) -> "tuple[PreTrainedModel, Path] | None":
    """The same model with its parameters on the device `meta`, and the directory whose safetensors files hold all of
    them by the model's own names; None where none does, as of adapters, quantised weights and names of before, which
    `load_model` reads."""
    from accelerate import init_empty_weights
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    if _adapters(source) or hasattr(_description(source), "quantization_config"):
        return None
    with init_empty_weights(include_buffers=False):
        model = skeleton(source, dtype, attn)
    model.tie_weights()
    with _reading(f"no causal language model could be loaded from {source!r}", source):
        folder = weights_folder(_locate(source))
        stored = stored_shapes(folder)
    if not own_tensors(model).items() <= stored.items():
        return None
    check_generation_config(folder)
    if (folder / GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, folder


def own_tensors(model: "PreTrainedModel") -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a model is saved as; a tensor that stands in two places is saved once."""
    once = {id(x): (name, tuple(x.shape)) for name, x in reversed(model.state_dict(keep_vars=True).items())}
    return dict(once.values())


def _reading(failed: str, source: str) -> AbstractContextManager[None]:
    """A boundary whose message names the damaged file, where one is found."""
    place = _locate(source)
    return foreign(failed, ConfigError, lambda: damaged(place))


def _description(source: str) -> "PreTrainedConfig":
    from transformers import AutoConfig, PreTrainedConfig

    place, failed = _locate(source), f"no causal language model could be loaded from {source!r}"
    with _reading(failed, source):
        tree, _ = PreTrainedConfig.get_config_dict(place)
    check_layers(tree, source)
    check_weight_names(place, tree)
    with _reading(failed, source):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        layers = config.get_text_config().num_hidden_layers
        if layers < 1:
            raise ConfigError(f"the configuration of {source!r} has {layers} layers: it is damaged")
    return config


def _stored_dtype(config: "PreTrainedConfig") -> torch.dtype:
    """The one that the configuration states; float32 where it states none."""
    stored = config.get_text_config().dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def attention(wanted: str, dtype: torch.dtype) -> str | None:
    """The attention to ask transformers for; None leaves it the choice (sdpa, where the model has it)."""
    from transformers.utils import is_flash_attn_2_available

    if wanted != "auto":
        return wanted
    return "flash_attention_2" if dtype != torch.float32 and is_flash_attn_2_available() else None


def end_tokens(
    tokenizer: "PreTrainedTokenizerBase", settings: EvalDataConfig, models: "Iterable[PreTrainedModel]"
) -> tuple[int, ...]:
    """All tokens that end a response: what ends an answer in the prompts' template, first; the tokenizer's
    end-of-sequence; and those of the models' generation configurations, which may name several."""
    found = [answer_end(tokenizer, settings)[-1], tokenizer.eos_token_id]
    for model in models:
        named = model.generation_config.eos_token_id if model.generation_config is not None else None
        ends = named if isinstance(named, list) else [named]
        if named is not None and not all(type(i) is int and 0 <= i < 2**31 for i in ends):
            raise ConfigError(
                f"{type(model).__name__}'s generation configuration says eos_token_id {named!r}; expected a token id, "
                "or a list of some: mend generation_config.json (or config.json)"
            )
        found += [i for i in ends if i is not None]
    return tuple(dict.fromkeys(found))


def packs_in_one_row(model: "PreTrainedModel") -> bool:
    """Whether packed sequences of a micro-batch must share a single row: transformers tells flash-attention where they
    begin, from their positions, for one row only; several would be read as one long sequence each."""
    return "flash" in (model.config._attn_implementation or "")


def load_tokenizer(source: str) -> "PreTrainedTokenizerBase":
    """The tokenizer that travels with a model; it must name an end-of-sequence token."""
    from transformers import AutoTokenizer

    if (adapters := _adapters(source)) and not (adapters.path / "tokenizer_config.json").exists():
        source = adapters.base
    place = _locate(source)
    with _reading(f"no tokenizer could be loaded from {source!r}", source):
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        tokenizer.encode("a")  # some that are damaged load, and encode nothing
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {source!r} has no end-of-sequence token, so no response would ever end")
    return tokenizer


Loader = Callable[[str, str, str, Any], "PreTrainedModel"]
"""`load_model`, or `skeleton`."""


def load_teacher(run: RunConfig, load: Loader = load_model) -> "PreTrainedModel | None":
    """The frozen teacher named in the configuration, None where it names none, one that is not loaded here, or the
    student's own base."""
    source = run.model.teacher
    if not source or own_weights(run) or addresses(source) or is_stored(source):
        return None
    return load_frozen(source, run, load)


def load_frozen(source: str, run: RunConfig, load: Loader = load_model) -> "PreTrainedModel":
    """A model that teaches, in the dtype and bits of the section `teacher`."""
    settings, rounded = run.teacher, None
    if settings.quantize:
        dtype = _stored_dtype(_description(source)) if settings.dtype == "checkpoint" else settings.dtype
        compute = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
        rounded = quantisation("teacher.quantize", settings.quantize, compute)
    return load(source, settings.dtype, run.model.attn, rounded).requires_grad_(False)


def own_weights(run: RunConfig) -> str:
    """Which of the student's own weights the teacher has, a value of teacher.source; "" for a model of its own.

    The base of a LoRA student that is named as model.teacher too is not loaded a second time, unless it is asked for
    in another dtype or other bits, or one of the two lives in shards.
    """
    settings, teacher = run.model, run.teacher
    if teacher.source != "checkpoint":
        return teacher.source
    if not settings.student or not settings.teacher:
        return ""
    adapters = _adapters(settings.student)
    base = adapters.base if adapters else settings.student if run.lora.rank else None
    same = base == settings.teacher and teacher.quantize == settings.quantize
    same = same and run.parallel.student == run.parallel.teacher == "replicate"
    return "base" if same and teacher.dtype in ("checkpoint", settings.dtype) else ""


def load_student(run: RunConfig, teacher: "PreTrainedModel | None", load: Loader = load_model) -> "PreTrainedModel":
    """The student named in the configuration, or the one cut from `teacher` by `model.drop_layers`; with adapters,
    where the configuration wants them."""
    settings = run.model
    adapters = _adapters(settings.student) if settings.student else None
    if settings.student:
        rounded = None
        if settings.quantize:
            if not adapters and not run.lora.rank:
                raise ConfigError("model.quantize rounds frozen weights: set lora.rank to train adapters above them")
            auto = "bfloat16" if torch.cuda.is_available() else settings.dtype
            compute = getattr(torch, auto if settings.compute_dtype == "auto" else settings.compute_dtype)
            rounded = quantisation("model.quantize", settings.quantize, compute)
        student = load(adapters.base if adapters else settings.student, settings.dtype, settings.attn, rounded)
    else:
        assert settings.drop_layers is not None and teacher is not None  # check_stage
        student = drop_layers(teacher, *settings.drop_layers).to(getattr(torch, settings.dtype)).requires_grad_(True)
    if adapters:
        continue_adapters(student, adapters, run.lora)
    elif run.lora.rank:
        add_adapters(student, run.lora, run.seed)
    if settings.recompute:
        recompute_layers(student)
    return student


def cached(module: nn.Module, cache: "Cache") -> dict[str, Any]:
    """What a forward of a transformers module is called with to go on from `cache` and to add to it."""
    names = inspect.signature(module.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}  # renamed by transformers


def _adapters(source: str) -> StoredAdapters | None:
    with _reading(f"no model could be loaded from {source!r}", source):
        return stored_adapters(_locate(source))


def _locate(source: str) -> str | Path:
    if source.startswith(packages.PREFIX):
        return packages.model_directory(source.removeprefix(packages.PREFIX))
    return source
