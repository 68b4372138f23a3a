"""The weights of a model as its checkpoint names them."""

import torch
from torch import Tensor

from minillm.model.adapters import merge_adapters
from minillm.model.head import CausalLM


@torch.no_grad()
def weights_of(lm: CausalLM, dtype: torch.dtype) -> dict[str, Tensor]:
    """All of them by name, adapters merged, shared ones once; those of floating point in `dtype`."""
    from transformers.core_model_loading import revert_weight_conversion

    model = merge_adapters(lm.model)
    once = {name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named}
    kept = {name: value for name, value in model.state_dict().items() if name in once}
    stored = revert_weight_conversion(model, kept)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in stored.items()}
