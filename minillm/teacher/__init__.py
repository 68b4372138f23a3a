"""Where the teacher's law comes from: a model in this process, one on a server, or what one has said before.

What training asks of a teacher is `Teacher`; a CausalLM in this process (minillm/model/head.py) is one.
"""

from typing import Protocol

from minillm.model.head import Scorer


class Teacher(Scorer, Protocol):
    """A teacher by its final hidden states, from which the losses form its whole law: `output(batch) -> Output(states
    [N, H], head)`, `head`, `vocab_size`, `device`."""

    def close(self) -> None:
        """Let go of what it holds outside of this process."""
