"""Servers of our own models in the place of vLLM's, and a pair of models."""

import pytest
from vllm_service import Service

from minillm.model.head import CausalLM
from minillm.model.load import load_model


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("minillm.engine.vllm_server.LONGEST_PAUSE", 0.01)


@pytest.fixture
def serve():
    made = []

    def begin(lm, **settings):
        made.append(Service(lm, **settings))
        return made[-1]

    yield begin
    for service in made:
        service.close()


@pytest.fixture
def student(make_llama):
    return CausalLM(make_llama(2, seed=1))


@pytest.fixture
def teacher(make_llama):
    return CausalLM(make_llama(3).requires_grad_(False))


@pytest.fixture
def services(serve, files):
    """Servers of the pair in `files`, and the flags that name them."""
    made = [serve(CausalLM(load_model(str(files / name)))) for name in ("student", "teacher")]
    flags = ["--rollout.engine=vllm", "--engine.retries=1"]
    return made, [*flags, *(f"--engine.{key}={s.url}" for key, s in zip(("url", "teacher_url"), made, strict=True))]
