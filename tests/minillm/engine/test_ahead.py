"""Responses that servers draw ahead of their use, by the older student's weights."""

import json
import threading

import pytest
import torch
from vllm_service import answers

from minillm import cli
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.engine.pair import IN_USE
from minillm.engine.rollout import engine_gap
from minillm.model.head import CausalLM
from minillm.train.ahead import _frozen
from minillm.train.loop import METHODS
from minillm.train.preflight import prepare

FLAGS = ["--method=minillm", "--optim.batch_size=4", "--rollout.batch_size=8", "--rollout.epochs=1", "--optim.steps=6",
         "--objective.pt_weight=0", "--rollout.max_new_tokens=6", "--validation.every=0"]  # fmt: skip


@pytest.fixture
def make(files, services, make_llama, make_tokenizer):
    def build(*flags):
        recipe = load_recipe(files / "recipe.yaml", [*FLAGS, f"--output={files / 'ahead'}", *services[1], *flags])
        student, teacher = CausalLM(make_llama(2, seed=1)), CausalLM(make_llama(4).requires_grad_(False))
        return prepare(recipe.run, recipe.stages["warm-up"], student, teacher, make_tokenizer())

    return build


@pytest.mark.parametrize("alpha", [0, 0.4])
def test_servers_sample_by_the_older_student(make, services, tmp_path, alpha):
    """Two steps a rollout: the second rollout is of the student before step 1, used by the student after step 2. The
    gap of the engine is to the student that it had."""
    services[0][1].lm = CausalLM(make(f"--rollout.alpha={alpha}").teacher.model)
    context = make("--rollout.overlap=1", f"--rollout.alpha={alpha}")
    method = METHODS["minillm"](context, tmp_path)
    method.step(1)
    method.ahead.sampling.result()
    same = make(f"--rollout.alpha={alpha}")
    sampler = METHODS["minillm"](same, tmp_path)
    expected = sampler.draw(1, sampler.prompted(1), same.student)
    with torch.no_grad():
        for parameter in context.student.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    method.step(3)
    found = method.rollout
    assert found.responses() == expected.responses() and (found.from_teacher == expected.from_teacher).all()
    torch.testing.assert_close(found.older_logprobs, expected.student_logprobs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.student_logprobs, found.older_logprobs, rtol=1e-2, atol=1e-2)
    assert float(engine_gap(found)) < 1e-4


def test_a_server_has_the_weights_of_one_draw_at_a_time(serve, student):
    """A thread draws by the older student while this one asks the newer: neither is answered by the other."""
    service, older = serve(student), _frozen(student, torch.float32)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    alone = [[each.token_ids for each in answers(lm, service, changes=True)] for lm in (student, older)]
    found = {}

    def ask(name, lm):
        found[name] = [[each.token_ids for each in answers(lm, service, changes=True)] for _ in range(4)]

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate((student, older))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == [[expected] * 4 for expected in alone] and alone[0] != alone[1]
    assert not IN_USE[service.url].locked()


def test_a_run_that_samples_ahead_ends_as_it_should_when_the_server_dies(files, services, capsys):
    (student, _), flags = services
    flags = [*flags, "--rollout.overlap=1", "--rollout.alpha=0", "--stages.minillm.rollout.epochs=1"]
    recipe = str(files / "recipe.yaml")
    assert cli.main(["train", recipe, "--no-doctor", *flags, f"--output={files / 'whole'}"]) == 0
    student.troubles = [None] * 30 + ["cut"] * 1000
    assert cli.main(["train", recipe, "--no-doctor", *flags]) == 2
    assert "does not answer" in capsys.readouterr().err
    student.troubles = []
    assert cli.main(["train", recipe, "--no-doctor", *flags, "--resume", "auto"]) == 0
    lines, expected = (
        [json.loads(line) for line in (files / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "whole")
    )
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("flags", [["--engine.url="], ["--engine.teacher_url=", "--rollout.alpha=0.2"]])
def test_an_engine_in_this_process_samples_nothing_ahead(make, flags):
    with pytest.raises(ConfigError, match=r"rollout\.overlap samples in a thread of this process"):
        make("--rollout.overlap=1", *flags)
