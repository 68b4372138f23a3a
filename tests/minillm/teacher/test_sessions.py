"""A teacher on a server takes its turns in a rollout: what is drawn is what the teacher here would draw."""

import json
from dataclasses import replace

import pytest
import torch

from minillm.cli import main
from minillm.config.schema import TeacherConfig
from minillm.model.coins import share_coins
from minillm.model.head import CausalLM
from minillm.model.sampling import Decoding, draw_uniforms, sample

QUICK = TeacherConfig(timeout=20.0, patience=1.0)
PROMPTS = [[5, 9, 33, 7], [8, 2], [100, 4, 4, 4, 17, 250], [3], [9, 9]]
TOKENS = 12


@pytest.fixture
def roll_out(make_llama):
    def run(teacher):
        uniforms = share_coins(draw_uniforms(5, TOKENS, len(PROMPTS)), 2)
        decoding = Decoding(TOKENS, ends=range(93, 115), coins_first=True)
        return sample(CausalLM(make_llama(2, seed=1)), teacher, PROMPTS, decoding, alpha=0.4, uniforms=uniforms)

    return run


def assert_same(found, expected):
    assert found.responses() == expected.responses() and torch.equal(found.from_teacher, expected.from_teacher)
    for name in ("teacher_logprobs", "mixture_logprobs", "teacher_hidden"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_turns_on_a_server_are_those_of_the_teacher_here(serve, ask, roll_out, make_llama):
    expected = roll_out(CausalLM(make_llama(4)))
    assert bool(expected.from_teacher.any()) and len(set(map(len, expected.responses()))) > 1
    server = serve()
    assert_same(roll_out(ask(server)), expected)
    assert len(server.teacher.sessions.open) == 2  # one for each group of coins


def test_sessions_make_way_for_others_and_are_read_anew(serve, ask, roll_out, make_llama):
    server = serve(cache_tokens=20)
    assert_same(roll_out(ask(server)), roll_out(CausalLM(make_llama(4))))
    kept = sum(len(each.exists) * each.length for each in server.teacher.sessions.open.values())
    assert kept <= 20


def test_another_server_goes_on_with_a_rollout(serve, ask, roll_out, make_llama):
    one, other = serve(), serve()
    teacher, reads = ask(one, other, settings=replace(QUICK, patience=10)), []
    read_on = teacher.read_on

    def counted(*args):
        reads.append(args)
        if len(reads) == 3:
            one.kill()
        if len(reads) == 5:
            other.teacher.sessions.open.clear()
        return read_on(*args)

    teacher.read_on = counted
    assert_same(roll_out(teacher), roll_out(CausalLM(make_llama(4))))


def test_a_run_that_mixes_a_served_teacher_is_the_run_with_the_teacher_here(files, serve):
    tree = (files / "recipe.yaml").read_text().partition("stages:")[0]
    stage = {
        "method": "minillm",
        "rollout": {"alpha": 0.3, "coins": 2, "batch_size": 8, "max_new_tokens": 6, "epochs": 1},
        "objective": {"pt_weight": 0},
        "optim": {"steps": 2, "batch_size": 4, "lr": 1e-3},
    }
    path, losses = files / "mixed.yaml", {}
    path.write_text(tree + "stages: " + json.dumps({"a": stage}))
    for name, flags in (("here", []), ("there", [f"--model.teacher={serve().url}"])):
        assert main(["train", str(path), "--no-doctor", f"--output={files / name}", *flags]) == 0
        lines = (files / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
        assert json.loads(lines[0])["rollout/from_teacher"] > 0
    assert losses["there"] == pytest.approx(losses["here"], rel=1e-4)
