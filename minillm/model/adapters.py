"""Low-rank adapters on a student, by peft: added, continued from a directory, merged, saved.

peft is called directly: the integration that transformers has of it may ask for a version that is not released.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minillm.config import schema
from minillm.config.schema import ConfigError
from minillm.model.quantised import forget_rounding, is_rounded, plain_linear
from minillm.model.trial import trying

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OLDEST = "0.18"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # of the adapters inside peft
PREFIX = "base_model.model."  # of the names in files of adapters


def adapters_unavailable() -> str | None:
    """Why adapters cannot be had here, or None."""
    try:
        import peft
        from packaging.version import Version
    except ImportError:
        return 'lora.rank needs peft: pip install "minillm-kernels[lora]"'
    if Version(peft.__version__) >= Version(OLDEST):
        return None
    return f'lora.rank needs peft {OLDEST} or later, not {peft.__version__}: pip install --upgrade "peft>={OLDEST}"'


@dataclass(frozen=True)
class StoredAdapters:
    """A directory that holds adapters, and no whole model."""

    path: Path
    config: Any
    """peft's LoraConfig."""

    @property
    def base(self) -> str:
        """The model that they were trained on. Raises ConfigError where the directory does not name it."""
        named = self.config.base_model_name_or_path
        if named:
            return str(named)
        raise ConfigError(
            f"{self.path / CONFIG} names no base model (base_model_name_or_path), as of a student that was cut from "
            "its teacher: name the directory in which the adapters are merged, or enter the base model there"
        )


def stored_adapters(source: str | Path) -> StoredAdapters | None:
    """The adapters that `source`, a directory or hub id, holds; None where it holds a whole model.

    Raises ConfigError for adapters of another kind, or in a format that could run code.
    """
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        return cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )

    if find("config.json") or not (found := find(CONFIG)):
        return None
    if why := adapters_unavailable():
        raise ConfigError(f"{source} holds adapters: {why}")
    from peft import LoraConfig, PeftConfig

    config = PeftConfig.from_pretrained(str(Path(found).parent))
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{found} describes adapters of the type {config.peft_type}; only LORA can be used here")
    if not find(WEIGHTS):
        raise ConfigError(f"{source} has no {WEIGHTS}: adapters are read from safetensors only")
    return StoredAdapters(Path(found).parent, config)


def add_adapters(model: "PreTrainedModel", lora: schema.LoraConfig, seed: int) -> None:
    """LoRA in place: its own weights, in float32, are trained, all others frozen. A cut student has no name, so that
    its adapters name no base model."""
    if why := adapters_unavailable():
        raise ConfigError(why)
    from peft import LoraConfig

    torch.manual_seed(seed)
    targets = lora.targets if lora.targets == "all-linear" else _names(lora.targets)
    whole = _names(lora.modules_to_save) or None
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, modules_to_save=whole, task_type="CAUSAL_LM"
    )
    config.base_model_name_or_path = model.name_or_path
    _inject(model, config, f"lora.targets {lora.targets}" + (f" with {lora.modules_to_save} whole" if whole else ""))


def continue_adapters(model: "PreTrainedModel", stored: StoredAdapters, lora: schema.LoraConfig | None = None) -> None:
    """Put stored adapters on their base model, in place, to be trained further. `lora` is what the configuration asks
    for: its rank is 0, or the stored one.

    Raises ConfigError where they do not fit the model or what is asked for.
    """
    config, path = copy.deepcopy(stored.config), stored.path
    if lora is not None and lora.rank and (lora.rank, lora.alpha) != (config.r, config.lora_alpha):
        raise ConfigError(
            f"lora.rank is {lora.rank} and lora.alpha {lora.alpha}; the adapters in {path} have {config.r} and "
            f"{config.lora_alpha}: leave the section lora out to train them further"
        )
    from peft import set_peft_model_state_dict

    config.inference_mode = False  # as saved adapters say
    _inject(model, config, f"what {path} says")
    if model.device.type == "meta":
        return
    with trying(model, f"take the adapters in {path}", "Check the base model that they name"):
        weights = {name.removeprefix(PREFIX): value for name, value in load_file(path / WEIGHTS).items()}
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=NAME)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wrong := [*sorted(trained.intersection(result.missing_keys)), *result.unexpected_keys]:
        raise ConfigError(f"the adapters in {path} do not fit {stored.base}: {', '.join(wrong[:3])} of {len(wrong)}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _inject(model: "PreTrainedModel", config: Any, said: str) -> None:
    """The head is read apart from the model (minillm/model/head.py), so an adapter there would be passed over."""
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    if (config.use_dora or config.lora_bias) and any(map(is_rounded, model.modules())):
        raise ConfigError(
            f"{said}: DoRA and biases of adapters cannot be merged into rounded weights; leave out model.quantize"
        )
    with trying(model, f"have adapters by {said}", "Name other modules in lora.targets"):
        inject_adapter_in_model(config, model, NAME)
    now = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(isinstance(module, BaseTunerLayer) for module in now):
        raise ConfigError(f"{said} reaches the embeddings or the head; name other modules")
    if tied and now != ends:
        raise ConfigError(
            f"{said} trains embeddings or head, which are one tensor in {type(model).__name__}: leave them out of "
            "lora.modules_to_save"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.eval()
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for parameter in layer.get_base_layer().parameters(recurse=False):
                if places[id(parameter)] > 1:
                    raise ConfigError(
                        f"the weight of {name} stands in several places of {type(model).__name__}, and adapters would "
                        "differ between them: name other modules in lora.targets"
                    )
    if model.device.type != "meta":
        with trying(model, f"have adapters by {said}", "Name other modules in lora.targets"):
            _check_merge(model)


@torch.no_grad()
def _check_merge(model: "PreTrainedModel") -> None:
    """Refuse adapters that the model does not use as they are merged, now and not at the export: some models reach
    past their modules for the weights. Tried on a float32 copy of the first module of each class that has some."""
    from peft.tuners.lora import LoraLayer

    chosen: dict[type, tuple[str, torch.nn.Module]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            name = name.rpartition(".")[0]
            while isinstance(module := model.get_submodule(name), LoraLayer):
                name = name.rpartition(".")[0]
            chosen.setdefault(type(module), (name, module))
    calls: dict[str, tuple[Any, Any]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.setdefault(name, (args, kwargs)) and None, with_kwargs=True
        )
        for name, module in chosen.values()
    ]
    try:
        model(input_ids=torch.tensor([[1, 2, 3, 4]], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, module in chosen.values():
        if name not in calls:
            continue
        part = copy.deepcopy(module)
        _plain_bases(part)
        part = part.float()
        layers = [each for each in part.modules() if isinstance(each, LoraLayer)]
        for each in layers:
            for key, parameter in each.named_parameters():
                if "lora_B" in key or "lora_embedding_B" in key:  # zero until they are trained
                    torch.manual_seed(parameter.numel())
                    parameter.normal_(std=0.1)
        args, kwargs = tree_map(_float, calls[name])
        apart = _first(part(*args, **kwargs))
        for each in reversed(layers):
            _merge(each, safe=True)
        merged = _first(part(*args, **kwargs))
        if not (apart - merged).abs().max() <= 1e-2 * apart.abs().max():
            raise ConfigError(
                f"{type(model).__name__} does not compute with adapters in {name} as it would with their merged "
                "weights: name other modules in lora.targets"
            )


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _first(output: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def has_adapters(model: "PreTrainedModel") -> bool:
    return bool(getattr(model, "peft_config", None))


def keep_base_in(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """The frozen weights below adapters in the dtype that they compute in, in place: autocast, which remembers the
    casts of trained weights only, would cast them anew for every token."""
    if has_adapters(model) and dtype != torch.float32:
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def merge_adapters(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of the model with its adapters added to the weights, in the dtype that its configuration names; the model
    itself where it has none."""
    if not has_adapters(model):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    dtype = merged.config.dtype or model.dtype
    _plain_bases(merged)
    for parameter in merged.parameters():
        parameter.data = parameter.data.float()  # a small product added in 16 bits would be rounded away
    layers = [module for module in merged.modules() if isinstance(module, BaseTunerLayer)]
    for layer in reversed(layers):  # several may be nested around one module that has several weights
        _merge(layer, safe=model.device.type != "meta")  # without storage there is nothing to check
    _unwrap(merged, lambda wrapper: wrapper.modules_to_save[NAME])
    forget_rounding(merged)
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
    return merged.requires_grad_(True)


def without_adapters(model: "PreTrainedModel") -> "PreTrainedModel":
    """The base model below the adapters, in place: the modules that peft put around its layers are taken away."""
    _unwrap(model, lambda wrapper: wrapper.original_module)
    return model


def _plain_bases(module: torch.nn.Module) -> None:
    """Plain float32 matrices below adapters that stand above fewer bits, in place."""
    from peft.tuners.lora import LoraLayer

    for layer in module.modules():
        if isinstance(layer, LoraLayer) and is_rounded(layer.get_base_layer()):
            layer.base_layer = plain_linear(layer.get_base_layer())


@torch.no_grad()
def _merge(layer: Any, safe: bool) -> None:
    """Add a layer's adapters to its matrix. peft's layers for matrices in fewer bits would round the sum."""
    if type(layer).__module__.endswith(".bnb"):
        layer.base_layer.weight += layer.get_delta_weight(NAME)
        layer.merged_adapters.append(NAME)
    else:
        layer.merge(safe_merge=safe)


def _unwrap(model: "PreTrainedModel", chosen: Callable[[Any], torch.nn.Module]) -> None:
    """Put the layers themselves in the place of peft's around them, and of modules that are trained whole the
    `chosen` ones."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    outermost: list[str] = []
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a module may stand in several places
        if any(name.startswith(f"{outer}.") for outer in outermost):
            continue
        if isinstance(module, BaseTunerLayer):
            outermost.append(name)
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            outermost.append(name)
            model.set_submodule(name, chosen(module))
    del model.peft_config


def save_adapters(model: "PreTrainedModel", path: Path) -> None:
    """The adapters alone, as `peft.PeftModel.from_pretrained(base, path)` loads them."""
    from peft import get_peft_model_state_dict

    path.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.peft_config[NAME])
    config.inference_mode = True
    config.save_pretrained(str(path))
    weights = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    named = {f"{PREFIX}{name.removeprefix(PREFIX)}": value.contiguous() for name, value in weights.items()}
    save_file(named, path / WEIGHTS, metadata={"format": "pt"})
