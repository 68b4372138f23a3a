"""The section `rollout`: how responses are sampled."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RolloutConfig:
    batch_size: int = 32
    """Prompts rolled out at once, over all processes."""
    max_new_tokens: int | tuple[tuple[int, int], ...] = 256
    """Longest response sampled, in tokens; or pairs of the optimiser steps done in the stage and the limit from there
    on: [[0, 64], [50, 256]] samples prefixes first."""
    alpha: float = 0.2
    """minillm: weight of the teacher in the sampling mixture; 0 samples from the student alone."""
    on_policy: float = 0.5
    """gkd: share of the steps that learn from the student's own samples; the others learn from the answers given."""
    on_policy_step: float = 0.0
    """gkd: added to that share, up to 1, at each validation whose loss is 0.1 above the one before; 0: it stays.
    DistiLLM: 0.1, with on_policy 0 and loss.divergence skew_forward_kl, loss.beta 0.1."""
    temperature: float = 1.0
    """Sampling temperature (minillm, gkd, seqkd); MiniLLM requires 1."""
    top_k: int = 0
    """Keep the k most likely tokens, 0 for all; MiniLLM requires 0."""
    top_p: float = 1.0
    """Nucleus mass, 1 for all; MiniLLM requires 1."""
    epochs: int = 4
    """minillm: passes over each batch of rollouts before the next is sampled."""
    coins: int | Literal["row"] = "row"
    """minillm: who shares the coin that picks the model of a position. `row`: each sequence has its own, and both
    models decode side by side. A number G: sequences i mod G share theirs, and the teacher runs at its own positions
    only, about alpha · max_new_tokens times for each of the G groups. Each sequence has the same law, exactly."""
    chunk_size: int = 0
    """Sequences that a process decodes at once, so that memory does not depend on batch_size; one that has ended makes
    place for the next prompt. 0: all of its share. It never changes a token."""
    overlap: int = 0
    """minillm: 1 samples the next batch of rollouts while the student learns from this one, by a copy of the student
    as it is when the batch begins; the importance weights are of that copy's law. With an engine it takes servers,
    and a run of one process. 0: one after the other."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Whether our decoder launches a token as a CUDA graph instead of as hundreds of kernels. `auto`: on a card, where
    the models let it; `true`: an error where that cannot be; `false`: never. It never changes a token."""
    engine: str = "builtin"
    """What samples: `builtin`, our decoder, or `vllm` (section `engine`). With alpha above 0, two engines throw the
    coins first, a coin for each row and position."""
    engine_correction: float = 0.0
    """minillm: weigh each token that an engine drew by q / q_engine, of the model that drew it, cut off at this number
    (TRL: 2); 0: not."""

    def limit(self, done: int) -> int:
        """Of the tokens of a response, once `done` steps of the stage are."""
        given = self.max_new_tokens
        return given if isinstance(given, int) else [tokens for first, tokens in given if first <= done][-1]

    @property
    def longest(self) -> int:
        """The limit when it is highest."""
        given = self.max_new_tokens
        return given if isinstance(given, int) else max(tokens for _, tokens in given)
