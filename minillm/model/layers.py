"""The decoder layers of a model: found, left out, or computed again in the backward pass."""

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.config.schema import ConfigError
from minillm.model.trial import trying

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PROBE = 16  # tokens on which a cut student is compared with its teacher
FIRST = ("first_k_dense_replace", "num_dense_layers")
LAST = ("num_kv_shared_layers",)
"""Settings that say how many layers at the start, and at the end, are of another kind."""
SMALLER = "Name a smaller model of the family in model.student"


def layers_of(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """The list of the text decoder's layers, and its name below the model. Raises ConfigError where there is none."""
    decoder = model.get_decoder()
    if not hasattr(decoder, "config"):  # a head of that name
        decoder = model.base_model
    count = getattr(decoder.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and any(module is m for m in decoder.modules()):
            return name, module
    raise ConfigError(f"{type(model).__name__} has no list of layers to cut a student from, or to recompute")


def recompute_layers(model: "PreTrainedModel") -> None:
    """Activation checkpointing of every layer, in place. The one of transformers wants a model in training mode, which
    would switch dropout on."""
    for layer in layers_of(model)[1]:
        layer.forward = functools.partial(_recomputed, layer.forward)


def _recomputed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():  # rollouts, with their caches
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def drop_layers(teacher: "PreTrainedModel", first: int, last: int) -> "PreTrainedModel":
    """A copy of `teacher` without its decoder layers first … last-1.

    A contiguous block from the middle is what a residual network misses least: the layers kept still see nearly the
    inputs they were trained on. What the configuration says of each layer (rotary or not, sliding window, experts, …)
    is cut with the layers, and the student is made from that configuration as it will be read back. Then its logits
    are compared with those of the teacher with the block skipped: what a layer is can also follow from its number.

    Raises ConfigError for a block that is not there, and for a model that cannot be cut without changing what is kept.
    """
    name, layers = layers_of(teacher)
    if not 0 <= first < last <= len(layers) or last - first == len(layers):
        raise ConfigError(
            f"model.drop_layers is [{first}, {last}); the teacher has layers [0, {len(layers)}), and some must stay"
        )
    kept = [i for i in range(len(layers)) if not first <= i < last]
    weights = {}
    for key, value in teacher.state_dict().items():
        if key.startswith(f"{name}."):
            layer, _, rest = key.removeprefix(f"{name}.").partition(".")
            if int(layer) not in kept:
                continue
            key = f"{name}.{kept.index(int(layer))}.{rest}"
        weights[key] = value
    with trying(teacher, "be cut by model.drop_layers", SMALLER):
        student = type(teacher)._from_config(
            _cut_config(teacher.config, kept),
            dtype=teacher.dtype,
            attn_implementation=teacher.config._attn_implementation,
        )
        student.load_state_dict(weights)
        student.name_or_path = student.config._name_or_path = ""  # it is not what stands at the teacher's path
        student.generation_config = copy.deepcopy(teacher.generation_config)
        student.eval()
        if teacher.device.type != "meta":
            _check_cut(teacher, student, layers, range(first, last))
    return student


def shrunk(model: "PreTrainedModel") -> "PreTrainedModel":
    """A model of the same class and settings with its first layer alone, 32 tokens and random weights, in float32.
    What such models do behind their layers can be tried on it.

    Raises ConfigError where there is none.
    """
    with trying(model, "be tried with one layer", "Serve it by `minillm teach`"):
        config = _cut_config(model.config, [0])
        text = config.get_text_config()
        text.vocab_size = 32
        text.pad_token_id = text.bos_token_id = text.eos_token_id = None
        return type(model)._from_config(config, dtype=torch.float32).eval()


def _cut_config(config: "PreTrainedConfig", kept: list[int]) -> "PreTrainedConfig":
    """The configuration of a model with these layers alone, as it is read back from its file."""
    tree = config.to_dict()
    text: dict[str, Any] = tree.get("text_config") or tree
    attributes = getattr(config.get_text_config(), "attribute_map", {})
    count_key = attributes.get("num_hidden_layers", "num_hidden_layers")
    count = config.get_text_config().num_hidden_layers
    for key, value in text.items():
        if key in FIRST and value is not None:
            text[key] = sum(i < value for i in kept)
        elif key in LAST and value is not None:
            text[key] = sum(i >= count - value for i in kept)
        if not isinstance(value, list):
            continue
        if len(value) == count:  # one entry a layer
            text[key] = [value[i] for i in kept]
        elif "layer" in key and all(type(i) is int and 0 <= i < count for i in value):  # numbers of layers
            text[key] = [kept.index(i) for i in value if i in kept]
    text[count_key] = len(kept)
    return type(config).from_dict(tree)


@torch.no_grad()
def _check_cut(teacher: "PreTrainedModel", student: "PreTrainedModel", layers: nn.ModuleList, block: range) -> None:
    rows = teacher.get_input_embeddings().weight.size(0)  # type: ignore[operator]
    ids = torch.arange(PROBE, device=teacher.device)[None] % rows

    def skip(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    hooks = [layers[i].register_forward_hook(skip, with_kwargs=True) for i in block]
    try:
        expected = teacher(input_ids=ids, use_cache=False).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
    found = student(input_ids=ids, use_cache=False).logits.float()
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference < (1e-4 if teacher.dtype in (torch.float32, torch.float64) else 2e-2):
        raise ConfigError(
            f"{type(teacher).__name__} cannot be cut by model.drop_layers (the layers that are kept would compute "
            f"something else: {difference:.1%} of the logits). {SMALLER}"
        )
