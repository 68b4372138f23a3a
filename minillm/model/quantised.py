"""Frozen weights held in 8 or 4 bits: which library rounds them, and what they are as plain matrices again."""

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minillm.config.schema import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIBRARIES = {"8bit": "torchao", "4bit": "bitsandbytes"}
"""Each rounds the weights alone: what is computed is a model with these weights. (int8 of bitsandbytes rounds the
activations too, so that log-probs of a rollout and of an update would differ.)"""
BITS = {"8bit": 8, "4bit": 4.127}
"""Per weight, with the scales: int8 has one for a row, NF4 one for 64 weights, in 8 bits."""


def quantisation(key: str, bits: str, compute: torch.dtype) -> Any:
    """What transformers calls a quantization_config.

    Args:
        key: the configuration's, for messages.
        bits: `8bit` or `4bit`.
        compute: dtype in which the matrices are multiplied.

    Raises ConfigError where the library that can do it is not installed.
    """
    library = LIBRARIES[bits]
    if importlib.util.find_spec(library) is None:
        raise ConfigError(f'{key} {bits} needs {library}: pip install "minillm-kernels[quantize]", or leave {key} out')
    if bits == "8bit":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def is_rounded(module: nn.Module) -> bool:
    """Whether a layer below adapters holds its matrix in fewer bits."""
    return type(getattr(module, "weight", None)).__name__ == "Params4bit"


def forget_rounding(model: "PreTrainedModel") -> None:
    """What transformers notes of a model whose matrices were rounded, once they are plain again."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def plain_weight(linear: Any) -> Tensor:
    """[out, in] float32: the weights that a linear layer computes with, whether it holds them rounded or not."""
    from peft.utils.integrations import dequantize_module_weight

    with torch.no_grad():
        return dequantize_module_weight(linear).detach().float().clone()


def plain_linear(linear: Any) -> nn.Linear:
    """The same layer with its weights as a plain float32 matrix."""
    weight, bias = plain_weight(linear), linear.bias
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().float().clone(), requires_grad=False)
    return plain


def held_bytes(model: "PreTrainedModel", bits: str) -> int:
    """Of its weights, with the matrices below the head in these bits; without `bits`, as they are."""
    total = sum(x.nbytes for x in model.parameters())
    if bits:
        head = model.get_output_embeddings()
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad:
                weight = module.weight
                total += round(weight.numel() * BITS[bits] / 8) - weight.nbytes
    return total
