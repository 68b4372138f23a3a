"""The teacher that a configuration names, wherever it is."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minillm.config.schema import ConfigError, EvalDataConfig, RunConfig, TeacherConfig
from minillm.config.teacher import addresses, is_stored
from minillm.model.check import check_same_tokenizer
from minillm.model.head import CausalLM, Scorer
from minillm.model.load import end_tokens, load_tokenizer
from minillm.teacher import Teacher
from minillm.teacher.served import ServedTeacher
from minillm.teacher.stored import StoredTeacher
from minillm.teacher.vllm_server import VllmTeacher
from minillm.teacher.wire import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Elsewhere = ServedTeacher | StoredTeacher | VllmTeacher
"""Teachers that are not in this process."""


def ends_of(
    tokenizer: "PreTrainedTokenizerBase", settings: EvalDataConfig, lms: Iterable[Scorer | None]
) -> tuple[int, ...]:
    """`end_tokens` of these models, wherever they are."""
    lms = list(lms)
    here = end_tokens(tokenizer, settings, [lm.model for lm in lms if isinstance(lm, CausalLM)])
    return tuple(dict.fromkeys([*here, *(token for lm in lms if isinstance(lm, Elsewhere) for token in lm.ends)]))


def choose_teacher(run: RunConfig, here: CausalLM | None, tokenizer: "PreTrainedTokenizerBase") -> Teacher | None:
    """The teacher of a run, `here` where it is in this process; None where the run has none.

    Raises ConfigError where its tokenizer is not the student's.
    """
    source = run.model.teacher
    if here is not None:
        if run.model.student:
            check_same_tokenizer(tokenizer, load_tokenizer(source))
        return here
    return elsewhere(source, run.teacher, tokenizer) if source else None


def is_elsewhere(source: str) -> bool:
    return bool(addresses(source)) or is_stored(source)


def elsewhere(
    source: str, settings: TeacherConfig, tokenizer: "PreTrainedTokenizerBase", device: torch.device | None = None
) -> Elsewhere:
    """The teacher behind an address, or in a directory; its states are given on `device`.

    Raises ConfigError where its tokenizer is not this one.
    """
    teacher: Elsewhere
    device = device or torch.device("cpu")
    if is_stored(source):
        teacher = StoredTeacher(Path(source), device)
        theirs = teacher.plan.tokenizer
    elif settings.provider == "vllm":
        teacher = VllmTeacher(addresses(source), settings, device)
        theirs = teacher.tokenizer
    else:
        teacher = ServedTeacher(addresses(source), settings, device)
        theirs = teacher.about["tokenizer"]
    if theirs != tokenizer_fingerprint(tokenizer):
        raise ConfigError(
            f"the teacher {source} reads ids of another tokenizer than the student's: it has "
            f"{theirs.get('entries')} entries, the student's {len(tokenizer.get_vocab())}. "
            "Token-level distillation needs one tokenizer; choose a student of the teacher's family"
        )
    return teacher
