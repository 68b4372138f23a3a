"""Low-rank adapters on a student, by peft."""

import copy
from typing import TYPE_CHECKING

import torch

from minillm.config import schema
from minillm.config.schema import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def add_adapters(model: "PreTrainedModel", lora: schema.LoraConfig, seed: int) -> None:
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
            module.merge(safe_merge=model.device.type != "meta")  # without storage there is nothing to check
            merged.set_submodule(name, module.get_base_layer())
    merged._hf_peft_config_loaded = False
    del merged.peft_config
    return merged.requires_grad_(True)
