"""What must hold of models and tokenizers before anything is trained, tried on a few tokens."""

from typing import TYPE_CHECKING

import torch

from minillm.config.schema import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE = "In 1984,  the naïve café (№ 7) answered: “2 + 2 = 5”?\n\n\tdef f(x): return x\n日本語 🙂"


def check_context(model: "PreTrainedModel", tokens: int) -> None:
    """Refuse sequences longer than the model has positions for."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"prompt and answer may reach {tokens} tokens, but {type(model).__name__} has {limit} positions: lower "
            "data.max_prompt_length, data.max_response_length or rollout.max_new_tokens"
        )


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
