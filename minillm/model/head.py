"""The seam between a model's final states and its vocabulary, where distillation spends its memory and time.

The base model and the vocabulary head are called apart: only positions whose prediction counts reach the head, and the
losses `fused_linear_*(*output, ...)` of minillm_kernels read states and weights, so that logits exist for the last
token of a rollout and nowhere else. A model whose head cannot be read goes through its own forward (`model.head:
logits`): its final states then are its logits, its head is `Head(None)`, and the same losses take them as they are.

Legend: B sequences, T positions, N positions selected over the batch, H hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from minillm.config.schema import ConfigError
from minillm.data.examples import Batch
from minillm.model.load import cached
from minillm.model.masks import Masks, of_batch
from minillm.model.split import is_split, split, split_logits
from minillm.model.trial import trying
from minillm_kernels import Head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

VOCABULARY = "common_vocab_size"
"""In a model's config.json: how many columns of its head count, where not all do."""

Sums = dict[str, Tensor]
"""Named sums over tokens; "loss" is differentiated, the others are logged."""


class Output(NamedTuple):
    """Final states [N, H] of the positions whose next token counts, and the head that reads them."""

    states: Tensor
    head: Head


class Scorer(Protocol):
    """A model as what scores texts, wherever it is: a teacher that need not decode."""

    @property
    def head(self) -> Head:
        """What reads its states, on `device`."""

    @property
    def vocab_size(self) -> int:
        """The columns of its head that count."""

    @property
    def device(self) -> torch.device:
        """Where its states and its head are."""

    def output(self, batch: Batch) -> Output:
        """The final states of the positions of a batch whose next token counts, and the head."""

    def keep_columns(self, count: int) -> None:
        """Have the first columns of the head alone from here on."""


class CausalLM(nn.Module):
    """A `transformers` causal language model opened at the seam.

    `forward` takes the loss along, because data-parallel wrappers act on `forward`: a head read beside it would not
    have its gradient reduced, nor its shards gathered.

    Raises ConfigError when `head` is "fused" and what is read from the model does not give the model's own logits, and
    for a model that cannot be run on token ids alone, or whose predictions see the tokens that they predict.
    """

    def __init__(
        self, model: "PreTrainedModel", head: str = "fused", constant: bool = False, tried: bool = True
    ) -> None:
        super().__init__()
        self.model = model
        self.constant = constant  # a teacher, even where its weights are those that are trained
        self.fused = head == "fused"
        _check_whole(self)
        self.split_over: DeviceMesh | None = None  # those that compute it together (minillm/parallel/tensor.py)
        self.copies: ProcessGroup | None = None  # those of all hosts that compute the same part of it
        self.split_head: Head | None = None
        self.copy_with: Callable[[Mapping[str, Tensor]], PreTrainedModel] | None = None  # of a student in shards
        self.takes_masks: bool | None = None  # minillm/model/masks.py tries it
        self.takes_rows: bool | None = None  # minillm/model/decoder.py tries it
        self.takes_graphs: bool | None = None  # minillm/model/static.py tries it
        if tried:
            self.check()

    def check(self) -> None:
        """Try what the class promises, where the model was made without: its weights were not there yet."""
        if self.fused:
            _check_head(self)
        _check_causal(self)

    @property
    def head(self) -> Head:
        """As constants where no gradient is taken: a teacher's."""
        return self._head().detach() if self.constant or not torch.is_grad_enabled() else self._head()

    def _head(self) -> Head:
        if not self.fused:
            return Head(None)
        head = read_head(self.model)
        if self.split_over is None:
            return first_columns(head, self.vocab_size)
        if self.split_head is None or len(self.split_head.weight) != self.vocab_size:  # type: ignore[arg-type]
            self.split_head = split(head, self.vocab_size, self.split_over)
        return self.split_head

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def rows(self) -> int:
        """All columns of its logits, which are the rows of its head."""
        if self.fused:
            return self.model.get_output_embeddings().weight.shape[0]
        return self.model.config.get_text_config().vocab_size

    @property
    def vocab_size(self) -> int:
        """The columns that count: the first ones, those that `share_vocabulary` left. `head` and logits have no
        others, so that nothing is learnt, measured or sampled beyond them."""
        return min(self.rows, getattr(self.model.config, VOCABULARY, self.rows))

    def keep_columns(self, count: int) -> None:
        """The configuration says so, and tells it to whoever loads the model that is saved."""
        setattr(self.model.config, VOCABULARY, count)

    def states(self, input_ids: Tensor, attention_mask: Masks, cache: Any = None, **inputs: Any) -> Tensor:
        """[B, T, H] final states, without any work on the vocabulary where the head is read apart."""
        module = self.model.base_model if self.fused else self.model
        inputs |= {"use_cache": False} if cache is None else cached(module, cache)
        with self.own_dtype():
            found = module(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        return found.last_hidden_state if self.fused else found.logits[..., : self.vocab_size]

    def own_dtype(self) -> AbstractContextManager:
        """Without autocast for a frozen model: it is in its dtype already, and autocast, which remembers the weights
        that it has cast only where they are trained, would cast it anew for every token. What is trained above a
        frozen base of 16 bits joins the base in its dtype."""
        parameters = [p for p in self.model.parameters() if p.is_floating_point()]  # not those in fewer bits
        frozen, trained = ({p.dtype for p in parameters if p.requires_grad == which} for which in (False, True))
        if not trained:
            return torch.autocast(self.device.type, enabled=False)
        below = frozen - trained - {torch.float32, torch.float64}
        return torch.autocast(self.device.type, below.pop()) if below else nullcontext()

    def logits(self, states: Tensor) -> Tensor:
        """[..., V] of states [..., H], without a gradient."""
        with torch.no_grad(), self.own_dtype():
            head = self._head()  # of the parameters themselves, whose casts autocast remembers
            return split_logits(head, states) if is_split(head) else head.logits(states)

    def output(self, batch: Batch) -> Output:
        states, head = self.states(**of_batch(self, batch)).flatten(0, 1)[batch.positions], self.head
        if head.weight is not None and not torch.is_autocast_enabled(states.device.type):
            states = states.to(head.weight.dtype)  # a head that is trained whole above a base of 16 bits
        return Output(states, head)

    def enter(self) -> None:
        """Nothing: what sharding does before a forward pass can be had by it alone (minillm/parallel/shard.py)."""

    def close(self) -> None:
        """Nothing: as a teacher, it holds nothing outside of this process."""

    def forward(self, batch: Batch, loss: Callable[[Output, Batch], Sums]) -> Sums:
        return loss(self.output(batch), batch)


def _check_whole(lm: CausalLM) -> None:
    """Refuse shards that others have made, as of `fsdp_size` in transformers: their groups for norm and head stay
    gathered after a forward pass, and an optimiser made then would step temporary copies of these weights."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in lm.model.modules()):
        raise ConfigError(
            f"{type(lm.model).__name__} is sharded already (DistributedConfig(fsdp_size=…) of transformers, or "
            "fully_shard), and would be trained without its head: load it whole and set parallel.student to shard "
            "(parallel.teacher for a teacher)"
        )


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


def first_columns(head: Head, count: int) -> Head:
    """The head of the first `count` tokens."""
    if head.weight is None or count >= len(head.weight):
        return head
    return replace(head, weight=head.weight[:count], bias=None if head.bias is None else head.bias[:count])


def common_vocabulary(*models: Scorer) -> int:
    """The columns that all of these models have: those of the smallest head; the rest is padding."""
    return min(lm.vocab_size for lm in models)


def share_vocabulary(*models: Scorer) -> None:
    """From here on the models have their common columns alone."""
    common = common_vocabulary(*models)
    for lm in models:
        if lm.vocab_size > common:
            lm.keep_columns(common)


@torch.no_grad()
def _check_head(lm: CausalLM) -> None:
    """Tried on two tokens rather than looked up in a list of architectures: what is wrong here would train another
    objective without a word.
    """
    model, switch = lm.model, "et model.head to logits to go through the model's own forward, at the cost of memory"
    linear = model.get_output_embeddings()
    if model.base_model is model or not isinstance(getattr(linear, "weight", None), Tensor):
        raise ConfigError(f"{type(model).__name__} has no separate base model and vocabulary head; s{switch}")
    ids = torch.tensor([[1, 2]], device=model.device)
    ones = torch.ones_like(ids)
    with trying(model, "be read before its head", f"S{switch}"):
        expected = model(input_ids=ids, attention_mask=ones).logits[..., : lm.vocab_size].float()
        found = lm.logits(lm.states(ids, ones)).float()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise ConfigError(
            f"the logits of {type(model).__name__} are not what its vocabulary head, soft-cap and logit scale give "
            f"from its final states: the model does something else in between; s{switch}"
        )


@torch.no_grad()
def _check_causal(lm: CausalLM) -> None:
    """Tried on two sequences that part after their second token."""
    name, ids = type(lm.model).__name__, torch.tensor([[1, 2, 3, 1], [1, 2, 4, 2]], device=lm.device)
    with trying(lm.model, "be run on token ids alone", "Choose another model"):
        one, other = lm.states(ids, torch.ones_like(ids))[:, :2].float()
    if one.isnan().any():
        raise ConfigError(f"{name} computes NaN: its weights are broken, or its dtype overflows")
    if not torch.allclose(one, other, rtol=0, atol=2e-2 * float(one[one.isfinite()].abs().max())):
        raise ConfigError(
            f"{name} lets a token see those that follow, which it is to predict: it is no causal language model as it "
            "is configured (is_decoder in its config.json)"
        )
