"""The seam between a model's final states and its vocabulary, where distillation spends its memory and time.

The base model and the vocabulary head are called apart: only positions whose prediction counts reach the head, and the
fused linear losses read states and weights, so that logits exist for the last token of a rollout and nowhere else. A
model whose head cannot be read goes through its own forward (`model.head: logits`): its final states then are its
logits, and the same losses take them as they are.

Legend: B sequences, T positions, N positions selected over the batch, H hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import minillm_kernels as kernels
from minillm.config.schema import ConfigError
from minillm.data.examples import Batch
from minillm.model.load import cached
from minillm_kernels import DistillLoss, DistillStats, MiniLLMLoss
from minillm_kernels.hidden.matmul import linear

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Sums = dict[str, Tensor]
"""Named sums over tokens; "loss" is differentiated, the others are logged."""


class Head(NamedTuple):
    """z = h Wᵀ + b, then z · scale, then softcap · tanh(z / softcap). Without a weight, h is z already."""

    weight: Tensor | None
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


class Output(NamedTuple):
    """Final states [N, H] of the positions whose next token counts, and the head that reads them."""

    states: Tensor
    head: Head


class CausalLM(nn.Module):
    """A `transformers` causal language model opened at the seam.

    `forward` takes the loss along, because data-parallel wrappers act on `forward`: a head read beside it would not
    have its gradient reduced, nor its shards gathered.

    Raises ConfigError when `head` is "fused" and what is read from the model does not give the model's own logits.
    """

    def __init__(self, model: "PreTrainedModel", head: str = "fused") -> None:
        super().__init__()
        self.model = model
        self.fused = head == "fused"
        if self.fused:
            _check_head(self)

    @property
    def head(self) -> Head:
        return read_head(self.model) if self.fused else Head(None)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        weight = self.head.weight
        return self.model.config.get_text_config().vocab_size if weight is None else weight.shape[0]

    def states(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: "Cache | None" = None, **inputs: Any
    ) -> Tensor:
        """[B, T, H] final states, without any work on the vocabulary where the head is read apart."""
        module = self.model.base_model if self.fused else self.model
        inputs |= {"use_cache": False} if cache is None else cached(module, cache)
        found = module(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        return found.last_hidden_state if self.fused else found.logits

    def logits(self, states: Tensor) -> Tensor:
        """[..., V] of states [..., H], without a gradient."""
        weight, bias, softcap, scale = self.head
        if weight is None:
            return states
        z = linear(states.flatten(0, -2), weight).unflatten(0, states.shape[:-1])
        z = z if bias is None else z + bias
        z = z if scale == 1 else z * scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    def output(self, batch: Batch) -> Output:
        return Output(self.states(**batch.inputs())[batch.predict], self.head)

    def forward(self, batch: Batch, loss: Callable[[Output, Batch], Sums]) -> Sums:
        return loss(self.output(batch), batch)


def read_head(model: "PreTrainedModel") -> Head:
    """The head of a model whose logits are softcap(scale · (h Wᵀ + b)).

    Which of these steps a family has stands in its config, under several names; a step left out would train another
    objective without a word.
    """
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    if scale is None:
        scale = 1 / getattr(config, "logits_scaling", 1)  # Granite divides
    return Head(linear.weight, getattr(linear, "bias", None), getattr(config, "final_logit_softcapping", None), scale)


def heads(student: Head, teacher: Head) -> dict[str, Any]:
    """Keyword arguments for `fused_linear_*`: weights, biases, soft-caps and scales; the teacher's as constants."""
    assert student.weight is not None and teacher.weight is not None
    return {
        "student_weight": student.weight,
        "student_bias": student.bias,
        "teacher_weight": teacher.weight.detach(),
        "teacher_bias": None if teacher.bias is None else teacher.bias.detach(),
        "softcap": (student.softcap, teacher.softcap),
        "logit_scale": (student.scale, teacher.scale),
    }


def common_vocabulary(student: CausalLM, teacher: CausalLM) -> int:
    """The one vocabulary size used everywhere: the smaller head; the rest is padding."""
    return min(student.vocab_size, teacher.vocab_size)


# ---- the losses, of two outputs


def token_logprobs(output: Output, token_ids: Tensor, vocab_size: int | None, temperature: float = 1.0) -> Tensor:
    """[N] log q(token)."""
    states, (weight, bias, softcap, scale) = output
    options: dict[str, Any] = {"vocab_size": vocab_size, "temperature": temperature}
    if weight is None:
        return kernels.token_logprobs(states, token_ids, **options)
    head: dict[str, Any] = {"bias": bias, "softcap": softcap, "logit_scale": scale}
    return kernels.fused_linear_token_logprobs(states, weight, token_ids, **head, **options)


def cross_entropy(student: Output, token_ids: Tensor, vocab_size: int | None) -> Tensor:
    """Summed over tokens, in nats."""
    states, (weight, bias, softcap, scale) = student
    if weight is None:
        return -kernels.token_logprobs(states, token_ids, vocab_size=vocab_size).sum()
    return kernels.fused_linear_distill_loss(
        states,
        weight,
        token_ids=token_ids,
        student_logprobs=-1.0,
        student_bias=bias,
        softcap=softcap,
        logit_scale=scale,
        vocab_size=vocab_size,
    ).loss


def distill_loss(student: Output, teacher: Output, token_ids: Tensor, **options: Any) -> DistillLoss:
    """Summed over tokens, any loss linear in the statistics: options as of `fused_linear_distill_loss`."""
    options["token_ids"] = token_ids
    return _of_pair(_distill_loss_of_logits, kernels.fused_linear_distill_loss, student, teacher, options)


def _distill_loss_of_logits(
    student: Tensor, teacher: Tensor, token_ids: Tensor, vocab_size: int | None, **coefficients: float
) -> DistillLoss:
    stats = kernels.distill_stats(student, teacher, token_ids, vocab_size=vocab_size)
    loss = torch.stack([c * getattr(stats, name).sum() for name, c in coefficients.items()]).sum()
    return DistillLoss(loss, DistillStats(*(x.detach() for x in stats)))


def divergence(student: Output, teacher: Output, name: str, **options: Any) -> Tensor:
    """The sum over tokens of a divergence; options as of `minillm_kernels.fused_divergence_loss`."""
    options |= {"divergence": name, "reduction": "sum"}
    return _of_pair(kernels.fused_divergence_loss, kernels.fused_linear_divergence_loss, student, teacher, options)


def distill_stats(student: Output, teacher: Output, token_ids: Tensor, **options: Any) -> DistillStats:
    """[N] each; options as of `minillm_kernels.distill_stats`."""
    options["token_ids"] = token_ids
    return _of_pair(kernels.distill_stats, kernels.fused_linear_distill_stats, student, teacher, options)


def minillm_loss(student: Output, teacher: Output, token_ids: Tensor, **options: Any) -> MiniLLMLoss:
    """MiniLLM's objective; options as of `minillm_kernels.minillm_loss`."""
    options["token_ids"] = token_ids
    return _of_pair(kernels.minillm_loss, kernels.fused_linear_minillm_loss, student, teacher, options)


def _of_pair(of_logits: Callable, of_states: Callable, student: Output, teacher: Output, options: dict) -> Any:
    if student.head.weight is None:
        return of_logits(student.states, teacher.states, **options)
    return of_states(
        student_hidden=student.states, teacher_hidden=teacher.states, **heads(student.head, teacher.head), **options
    )


@torch.no_grad()
def _check_head(lm: CausalLM) -> None:
    """Tried on two tokens rather than looked up in a list of architectures: what is wrong here would train another
    objective without a word.
    """
    model, switch = lm.model, "; set model.head to logits to go through the model's own forward, at the cost of memory"
    linear = model.get_output_embeddings()
    if model.base_model is model or not isinstance(getattr(linear, "weight", None), Tensor):
        raise ConfigError(f"{type(model).__name__} has no separate base model and vocabulary head{switch}")
    ids = torch.tensor([[1, 2]], device=model.device)
    ones = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=ones).logits.float()
    found = lm.logits(lm.states(ids, ones)).float()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"the logits of {type(model).__name__} are not what its vocabulary head, soft-cap and logit scale give "
            f"from its final states: the model does something else in between{switch}"
        )
