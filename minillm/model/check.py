"""What must hold of models and tokenizers before anything is trained, tried on a few tokens."""

from typing import TYPE_CHECKING

import torch

from minillm.config.schema import ConfigError
from minillm.data.examples import collate
from minillm.foreign import foreign
from minillm.model.decoder import Decoder, left_pad
from minillm.model.head import CausalLM
from minillm.model.load import packs_in_one_row
from minillm.model.masks import decodes_by_sdpa
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.model.trial import trying
from minillm_kernels import fused_linear_token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIMITS = "data.max_prompt_length, data.max_response_length or rollout.max_new_tokens"
PROBE = "In 1984,  the naïve café (№ 7) answered: “2 + 2 = 5”?\n\n\tdef f(x): return x\n日本語 🙂"

NOT_SAMPLED = "Train it by sft or kd with `minillm train`, which do not sample, or choose another model"


def check_context(model: "PreTrainedModel", tokens: int, limits: str = LIMITS) -> None:
    """Refuse sequences longer than the model has positions for, and name the `limits` to lower."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"prompt and answer may reach {tokens} tokens, but {type(model).__name__} has {limit} positions: lower "
            f"{limits}"
        )


@torch.no_grad()
def check_forward(model: "PreTrainedModel") -> None:
    """Refuse a model that cannot compute, as where its configuration is damaged in a way that its weights allow."""
    with foreign(f"{type(model).__name__} cannot compute as its configuration says", ConfigError):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)


def check_ids(model: "PreTrainedModel", largest: int, source: str) -> None:
    """Refuse token ids that the model has no embedding for, as of a token that was added to the tokenizer alone."""
    rows = model.get_input_embeddings().weight.size(0)  # type: ignore[operator]
    if largest >= rows:
        raise ConfigError(
            f"{source} holds the token id {largest}, but {type(model).__name__} has {rows} embeddings: use the "
            "tokenizer that was saved with the model, or resize the model's embeddings"
        )


@torch.no_grad()
def check_packing(model: "PreTrainedModel") -> None:
    """Refuse data.packing where the model lets one sequence of a row see another, or one row another, in rows made as
    training makes them, and long enough for attention that compresses or forgets what is far away."""
    rows = model.get_input_embeddings().weight.size(0)  # type: ignore[operator]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 98
    lengths = [min(n, limit - 8) for n in (60, 3, 90, 70, 30, 5)]
    prompts = [[(7 * i + n) % (rows - 1) + 1 for i in range(n)] for n in lengths]
    responses = [prompt[::-1][:8] for prompt in prompts]
    two_rows, one_row = 178, sum(map(len, [*prompts, *responses]))
    packed = collate(prompts, responses, one_row if packs_in_one_row(model) else two_rows).to(model.device)
    alone = [
        collate([prompt], [response]).to(model.device) for prompt, response in zip(prompts, responses, strict=True)
    ]
    with trying(model, "read packed sequences", "Set data.packing to false"):
        found = model(**packed.inputs(), use_cache=False).logits[packed.predict]
        expected = torch.cat([model(**each.inputs(), use_cache=False).logits[each.predict] for each in alone])
    if not torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"{type(model).__name__} does not keep packed sequences apart: set data.packing to false, or model.attn "
            "to sdpa"
        )


@torch.no_grad()
def check_decoding(lm: CausalLM, length: int = 8) -> None:
    """Refuse a model whose decoding with a cache, token by token behind left padding, has another law than its forward
    pass over the whole sequence: rollouts would be of one law and learnt by another. Tried on a sequence of `length`
    tokens, because some differ beyond their attention's window alone, and on a short one."""
    rows = lm.model.get_input_embeddings().weight.size(0)  # type: ignore[operator]
    prompts = [[n % (rows - 1) + 1 for n in range(max(length - 3, 3))], [2, 3]]
    uniforms = draw_uniforms(0, 3, len(prompts))
    with trying(lm.model, "decode with a cache behind padding", NOT_SAMPLED):
        rollout = sample(lm, None, prompts, Decoding(3, ends=()), alpha=0.0, uniforms=uniforms)
        batch = collate(prompts, rollout.responses()).to(lm.device)
        whole = fused_linear_token_logprobs(*lm.output(batch), batch.targets)
    apart = float((rollout.student_logprobs[rollout.mask] - whole).abs().max())
    if not apart < (1e-2 if lm.model.dtype in (torch.float32, torch.float64) else 0.5):
        raise ConfigError(
            f"{type(lm.model).__name__} decodes by another law than its forward pass has ({apart:.2g} nats apart): "
            f"its cache or its padding does not work here. {NOT_SAMPLED}"
        )


@torch.no_grad()
def check_blocks(lm: CausalLM) -> None:
    """Refuse rollout.coins for a teacher that reads several tokens behind its cache by another law than its forward
    pass over the whole sequence."""
    prompts, responses = [[1, 2, 3, 4, 5], [2, 3]], [[4, 1, 2, 3], [5, 4, 3, 2]]
    batch = collate(prompts, responses).to(lm.device)
    whole = fused_linear_token_logprobs(*lm.output(batch), batch.targets)
    padded, tokens = left_pad(prompts, 4, lm.device), torch.tensor(responses, device=lm.device)
    with decodes_by_sdpa(lm):
        decoder = Decoder(lm, padded.exists, padded.any)
        states = torch.cat([decoder.read(padded.ids)[:, -1:], decoder.read(tokens[:, :-1])], dim=1)
    found = fused_linear_token_logprobs(states.flatten(0, 1), lm.head, tokens.flatten())
    apart = float((found - whole).abs().max())
    if not apart < (1e-2 if lm.model.dtype in (torch.float32, torch.float64) else 0.5):
        raise ConfigError(
            f"{type(lm.model).__name__} reads a block of tokens behind its cache by another law than its forward pass "
            f"has ({apart:.2g} nats apart): set rollout.coins to row"
        )


def check_training(lm: CausalLM) -> None:
    """Refuse a student whose backward pass fails, by the gradient of one of its weights."""
    batch = collate([[1, 2, 3]], [[4, 1]]).to(lm.device)
    trained = next((parameter for parameter in lm.parameters() if parameter.requires_grad), None)
    if trained is None:
        return
    with trying(lm.model, "be trained", "Set model.recompute to false, or choose another model"):
        logprobs = fused_linear_token_logprobs(*lm.output(batch), batch.targets)
        torch.autograd.grad(logprobs.sum(), trained, allow_unused=True)


def check_same_tokenizer(student: "PreTrainedTokenizerBase", teacher: "PreTrainedTokenizerBase") -> None:
    """Refuse two tokenizers that differ: reverse KL compares the models token by token.

    Raises ConfigError that says what differs.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = {token for token, i in ours.items() if theirs.get(token) != i} | (theirs.keys() - ours.keys())
        shown = ", ".join(repr(token) for token in sorted(differing)[:5])
        reason = f"{len(differing)} tokens differ ({len(ours)} against {len(theirs)} entries), such as {shown}"
    elif (a := student.encode(PROBE)) != (b := teacher.encode(PROBE)):
        reason = f"the vocabularies agree, but one text gives {len(a)} and {len(b)} tokens that are not the same"
    else:
        return
    raise ConfigError(
        f"teacher and student have different tokenizers: {reason}. Token-level distillation needs one tokenizer; "
        "choose a student of the teacher's family, or cut one from it with model.drop_layers"
    )
