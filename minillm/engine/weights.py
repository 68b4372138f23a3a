"""The weights of a model as its checkpoint names them."""

import torch
from torch import Tensor

from minillm.model.adapters import merge_adapters
from minillm.model.head import CausalLM


@torch.no_grad()
def weights_of(lm: CausalLM, dtype: torch.dtype) -> dict[str, Tensor]:
    """All of them by name, adapters merged; those of floating point in `dtype`. A head that is tied to the embeddings
    is among them, though no checkpoint holds it: on a CPU vLLM has a packed copy of it, which would stay as it was."""
    from transformers.core_model_loading import revert_weight_conversion

    model = merge_adapters(lm.model)
    stored = revert_weight_conversion(model, model.state_dict())
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in stored.items()}
