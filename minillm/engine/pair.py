"""The engines of student and teacher: made once for each model, kept as long as it lives."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import NamedTuple
from weakref import WeakKeyDictionary, finalize, proxy

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from minillm.config.engine import EngineConfig
from minillm.config.schema import ConfigError
from minillm.engine import Engine, law_of
from minillm.engine.push import pusher
from minillm.engine.responses import Response, Voice, responses_to, write
from minillm.engine.vllm_offline import Offline, vllm_unavailable
from minillm.engine.vllm_server import Server
from minillm.lost import ServerLost
from minillm.model.head import CausalLM
from minillm.model.sampling import Decoding

IN_USE: defaultdict[str, Lock] = defaultdict(Lock)
"""Of each server, by its URL: it has the weights of one draw at a time, also where a thread samples ahead."""
ENGINES: WeakKeyDictionary[CausalLM, tuple[EngineConfig, Engine]] = WeakKeyDictionary()


class Draw(NamedTuple):
    """Which models draw, from which law."""

    student: CausalLM
    teacher: CausalLM | None
    """None where it has no part in the draw."""
    alpha: float
    decoding: Decoding
    vocab_size: int


def engine_of(
    lm: CausalLM, config: EngineConfig, dtype: torch.dtype | None = None, *, changes: bool = False
) -> Engine:
    """The engine of a model: behind the URL of the student or, for a frozen model, of the teacher; where that is
    empty, in this process. One that is made computes in `dtype`, by default the model's. changes: whether the weights
    of a frozen model change, as those of a student's older copy do.

    Raises ConfigError where there can be none.
    """
    if lm in ENGINES:
        known_config, engine = ENGINES[lm]
        if known_config == config:
            return engine
        engine.close()
    state, dtype = PartialState(), dtype or lm.model.dtype
    trained = changes or any(parameter.requires_grad for parameter in lm.parameters())
    known: CausalLM = proxy(lm)  # type: ignore[assignment]  # an engine must not keep its model alive
    if url := config.url if trained else config.teacher_url:
        push = pusher(known, config, dtype) if trained else None
        engine = Server(url, config, push, state.is_main_process)
    elif state.num_processes > 1:
        raise ConfigError(
            f"an engine in this process has no share of a run of {state.num_processes} processes: start a server and "
            "name it in engine.url (the student's) and engine.teacher_url"
        )
    elif why := vllm_unavailable():
        raise ConfigError(why)
    else:
        engine = Offline(known, config, dtype)
    ENGINES[lm] = config, engine
    finalize(lm, engine.close)
    return engine


def draw(
    how: Draw, engines: tuple[Engine, Engine | None], prompts: Sequence[Sequence[int]], uniforms: Tensor
) -> list[Response]:
    """Responses by engines. Every process of a run must call it, each for its own prompts.

    Args:
        how: models and law.
        engines: of student and teacher.
        prompts: B of them.
        uniforms: [T, B, 2], as `sample` takes them: coins, and seeds of what is drawn.

    Raises ServerLost, in all processes when in one.
    """
    awake = [engine for engine in engines if engine is not None]
    length = max(map(len, prompts), default=0) + how.decoding.max_new_tokens
    responses = responses_to(prompts, how.decoding.ends, how.alpha, uniforms)
    lms = (how.student, how.teacher)
    voices = [
        Voice(engine, law_of(how.decoding, how.vocab_size, lm.rows)) if engine is not None and lm is not None else None
        for engine, lm in zip(engines, lms, strict=True)
    ]
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(how.student.device.type, enabled=False))  # an engine has a dtype of its own
        if any(isinstance(engine, Offline) for engine in awake):
            stack.enter_context(torch.random.fork_rng(devices=[]))  # vLLM seeds torch's generator, and draws from it
        for url in sorted({engine.url for engine in awake if isinstance(engine, Server)}):
            stack.enter_context(IN_USE[url])
        try:
            _write(responses, voices, awake, length)
        finally:
            for engine in awake:
                engine.rest()
    return responses


def draw_everywhere(
    how: Draw, engine: Engine, prompts: Sequence[Sequence[int]], uniforms: Tensor | None = None
) -> list[Response]:
    """Responses of one model to prompts that all processes share; all of them know all responses. Greedy decoding
    needs no uniforms."""
    state = PartialState()
    if uniforms is None:
        uniforms = torch.zeros(how.decoding.max_new_tokens, len(prompts), 2)
    rows = range(len(prompts))[state.process_index :: state.num_processes]
    found = draw(how, (engine, None), [prompts[row] for row in rows], uniforms[:, list(rows)])
    everyone = gather_object(list(zip(rows, found, strict=True)))
    return [response for _, response in sorted(everyone, key=lambda numbered: numbered[0])]


def _write(
    responses: Sequence[Response], voices: Sequence[Voice | None], awake: Sequence[Engine], length: int
) -> None:
    with _together():
        for engine in awake:
            engine.wake(length)
    for engine in awake:
        if isinstance(engine, Server):
            engine.version = gather_object([engine.version])[0]  # the first process has pushed
    assert voices[0] is not None
    with _together():
        write(responses, voices[0], voices[1])


@contextmanager
def _together() -> Iterator[None]:
    """An engine that is lost to one process is lost to all: they would wait for it elsewhere."""
    lost: ServerLost | None = None
    try:
        yield
    except ServerLost as error:
        lost = error
    found = [words for words in gather_object([str(lost) if lost else ""]) if words]
    if found:
        raise ServerLost(found[0], everywhere=True) from lost
