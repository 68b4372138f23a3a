"""A teacher whose states a server of vLLM gives, played by a server of the standard library; vLLM itself is in
tests/minillm/engine/test_vllm.py."""

import json
from dataclasses import replace

import pytest
import torch
from vllm_service import Service

from minillm.cli import main
from minillm.config.schema import ConfigError, TeacherConfig
from minillm.data.examples import collate
from minillm.evaluation.measure import left_out
from minillm.lost import ServerLost
from minillm.model.head import CausalLM
from minillm.model.load import load_model
from minillm.teacher.vllm_server import VllmTeacher, head_of

pytest.importorskip("urllib3", reason="the extra `teach`")
VLLM = TeacherConfig(provider="vllm", timeout=20.0, patience=0.5)
PROMPTS, RESPONSES = [[5, 9, 33, 7], [8, 2], [100, 4, 4, 17, 250]], [[6, 7, 8], [3], [12, 13, 14, 15, 16]]


@pytest.fixture
def service(files):
    made = []

    def begin(lm=None, **settings):
        lm = lm or CausalLM(load_model(str(files / "teacher")).requires_grad_(False))
        made.append(Service(lm, **{"root": files / "teacher", **settings}))
        return made[-1]

    yield begin
    for each in made:
        each.close()


@pytest.fixture
def connect():
    made = []

    def begin(*services, settings=VLLM):
        made.append(VllmTeacher([each.url for each in services], settings, torch.device("cpu")))
        return made[-1]

    yield begin
    for each in made:
        each.close()


@torch.no_grad()
@pytest.mark.parametrize(("row_length", "turns"), [(0, None), (30, None), (0, [[(1, 2)], [], [(2, 4)]])])
def test_states_and_head_are_those_of_the_teacher(service, connect, files, row_length, turns, monkeypatch):
    monkeypatch.setattr("minillm.teacher.vllm_server.AT_ONCE", 9)  # several requests
    here = CausalLM(load_model(str(files / "teacher")))
    found, batch = connect(service()), collate(PROMPTS, RESPONSES, row_length, turns)
    expected = here.output(collate(PROMPTS, RESPONSES, 0, turns))
    torch.testing.assert_close(found.output(batch).states, expected.states, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.head.weight, expected.head.weight) and found.vocab_size == here.vocab_size
    assert found.ends == [0] and found.longest == 512 and found.dtype == torch.float32


@torch.no_grad()
def test_states_travel_in_bfloat16_where_that_is_asked(service, connect, files):
    batch, here = collate(PROMPTS, RESPONSES), CausalLM(load_model(str(files / "teacher")))
    found = connect(service(), settings=replace(VLLM, wire="bfloat16")).output(batch).states
    expected = here.output(batch).states
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-5)


def test_a_head_in_shards_tied_or_not_is_found_in_the_files(make_llama, make_gpt2, tmp_path):
    for name, model in (
        ("tied", make_llama(1, tie_word_embeddings=True)),
        ("gpt2", make_gpt2()),
        ("own", make_llama()),
    ):
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        head, unread = head_of(str(tmp_path / name))
        assert torch.equal(head.weight, model.get_output_embeddings().weight)
        assert unread.get_output_embeddings().weight.device.type == "meta"


def test_a_model_that_does_more_behind_its_final_states_is_refused(make_llama, tmp_path, monkeypatch):
    make_llama(2).save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaForCausalLM.forward", _tripled())
    with pytest.raises(ConfigError, match="the model does something else in between"):
        head_of(str(tmp_path))


def _tripled():
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def tripled(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        found.logits = 3 * found.logits
        return found

    return tripled


@pytest.mark.parametrize("method", ["kd", "gkd", "minillm"])
def test_runs_learn_what_the_teacher_teaches(files, service, method, capsys):
    tree = (files / "recipe.yaml").read_text().partition("stages:")[0]
    optim = {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-3}
    rollout = {"alpha": 0.0, "batch_size": 8, "max_new_tokens": 6, "epochs": 1}
    stage = {"method": method, "optim": optim, "rollout": rollout, "objective": {"pt_weight": 0}}
    (files / "one.yaml").write_text(tree + "stages: " + json.dumps({"a": stage}))
    losses, flags = {}, [f"--model.teacher={service().url}", "--teacher.provider=vllm"]
    command = "distill" if method == "kd" else "train"
    for name, more in (("here", []), ("there", flags)):
        assert main([command, str(files / "one.yaml"), f"--output={files / name}", *more]) == 0, capsys.readouterr()
        losses[name] = [json.loads(line)["loss"] for line in (files / name / "metrics.jsonl").read_text().splitlines()]
    assert losses["there"] == pytest.approx(losses["here"], rel=1e-4)
    if command == "distill":
        assert "the teacher's own answers are not evaluated" in capsys.readouterr().out
        here, there = (json.loads((files / run / "summary.json").read_text())["evaluations"] for run in losses)
        assert list(there) == ["start", "a"] and there["a"]["reverse_kl"].keys() == {"own_samples", "references"}
        for along, found in there["a"]["reverse_kl"].items():
            assert found["mean"] == pytest.approx(here["a"]["reverse_kl"][along]["mean"], rel=1e-4)


def test_an_evaluation_leaves_out_what_needs_the_teachers_draws_and_says_so(files, service, connect, capsys):
    served = service()
    command = ["evaluate", str(files / "student"), "--data", str(files / "eval.jsonl"), "--eval.sample_tokens=5"]
    assert main([*command, "--eval.greedy_tokens=5", "--teacher", served.url, "--teacher.provider=vllm"]) == 0
    shown = capsys.readouterr()
    assert "not measured: the forward KL on the teacher's samples" in shown.err
    found = json.loads(shown.out)
    assert found["reverse_kl"].keys() == {"own_samples", "references"} and "exposure_bias" not in found
    assert found["forward_kl"].keys() == {"references"}
    assert left_out(connect(served), ["samples", "references"]) == ""


@pytest.mark.parametrize(
    ("model", "teacher", "flags", "words"),
    [
        ("http://a:1", None, ["--tokenizer=STUDENT", "--teacher.provider=vllm"], "needs a server of `minillm teach`"),
        ("STUDENT", "STUDENT", ["--teacher.provider=vllm"], "for a teacher that is the address of vLLM"),
        ("STUDENT", "http://a:1", ["--teacher.files=STUDENT"], "for a teacher that is the address of vLLM"),
        ("STUDENT", "http://", [], "the teacher is 'http:'; expected http://HOST:PORT"),
        ("http://a:1?b", None, ["--tokenizer=STUDENT"], "the model is 'http://a:1?b'; expected http://HOST:PORT"),
        ("STUDENT", "http://a:1", ["--teacher.wire=int8"], "teacher.wire is 'int8'"),
        ("STUDENT", "http://a:1", ["--teacher.provider=vllm", "--teacher.wire=float8"], "neither scaled float8"),
        ("STUDENT", "http://a:1", ["--teacher.timeout=0"], "teacher.timeout must be above 0"),
    ],
)
def test_evaluations_that_cannot_be_are_refused_at_once(files, model, teacher, flags, words, capsys):
    against = ["--teacher", teacher] if teacher else []
    command = ["evaluate", model, "--data", str(files / "eval.jsonl"), *against, *flags]
    assert main([each.replace("STUDENT", str(files / "student")) for each in command]) == 2
    assert words in capsys.readouterr().err


def test_another_server_takes_over_and_one_that_is_gone_is_lost(service, connect):
    one, other = service(), service()
    teacher, batch = connect(one, other), collate(PROMPTS, RESPONSES)
    expected = teacher.output(batch).states
    one.close()
    for _ in range(3):
        assert torch.equal(teacher.output(batch).states, expected)
    other.close()
    with pytest.raises(ServerLost, match=r"has not answered for 0.5 s"):
        teacher.output(batch)


def test_what_is_no_such_server_is_refused(service, connect, files, make_llama):
    with pytest.raises(ConfigError, match=r"name a copy of its files, or its hub id, in teacher\.files"):
        connect(service(root="/nowhere"))
    assert connect(service(root="/nowhere"), settings=replace(VLLM, files=str(files / "teacher"))).hidden_size == 32
    with pytest.raises(ConfigError, match="serve different models"):
        connect(service(), service(root="/elsewhere"))
    with pytest.raises(ServerLost, match=r"not 32 numbers of torch.float32 .* Start it by vllm serve"):
        connect(service(CausalLM(make_llama(2, hidden_size=64))))
    with pytest.raises(ConfigError, match="reads 10: start it with a higher --max-model-len"):
        connect(service(longest=10)).check(11, 5)
    with pytest.raises(ConfigError, match="has 257 embeddings"):
        connect(service()).check(5, 257)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method=seqkd"], "method seqkd learns from its answers"),
        (["--method=minillm", "--rollout.coins=4"], "rollout.alpha is above 0"),
        (["--method=kd", "--teacher.wire=float8"], "neither scaled float8"),
        (["--method=kd", "--teacher.compress=true"], "neither scaled float8"),
        (["--method=kd", "--teacher.provider=tgi"], "expected one of minillm, vllm"),
        (["--method=kd", "--model.teacher=TEACHER"], "are for a model.teacher that is the address"),
        (["--method=kd", "--teacher.provider=minillm", "--teacher.files=a"], "are for a model.teacher that is"),
    ],
)
def test_settings_that_a_teacher_in_vllm_cannot_have_are_refused(files, flags, words, capsys):
    (files / "plain.yaml").write_text((files / "recipe.yaml").read_text().partition("stages:")[0])
    flags = [flag.replace("TEACHER", str(files / "teacher")) for flag in flags]
    command = ["train", str(files / "plain.yaml"), "--model.teacher=http://a:1", "--teacher.provider=vllm"]
    assert main([*command, *flags]) == 2
    assert words in capsys.readouterr().err
