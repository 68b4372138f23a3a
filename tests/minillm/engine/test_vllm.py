"""On a real engine: the law it draws from, weights pushed into it, a server that dies, and whole steps.

They run where vLLM can be imported, which is an environment of its own: `bash tests/tools/engine_environment.sh PATH`,
then `PATH/bin/python -m pytest -m engine`.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch

from minillm import cli
from minillm.config.engine import EngineConfig
from minillm.config.teacher import TeacherConfig
from minillm.data.examples import collate
from minillm.engine.pair import Draw, draw, engine_of
from minillm.engine.rollout import drawn, engine_gap, read
from minillm.model.head import CausalLM
from minillm.model.load import load_model
from minillm.model.rollout import mixture_logprobs
from minillm.model.sampling import Decoding, draw_uniforms
from minillm.teacher.vllm_server import VllmTeacher

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM: tests/tools/engine_environment.sh"),
]
SECTION = EngineConfig(memory=0.125)
WIDE = {"hidden_size": 128}  # heads of 32, the smallest that vLLM's attention on a CPU takes
VOCABULARY = 257


@pytest.fixture(scope="module")
def pair():
    """Engines stay with their models: one pair for the tests of this file."""
    from tests.minillm.conftest import tiny_llama

    teacher = CausalLM(tiny_llama(3, **WIDE).requires_grad_(False))
    return CausalLM(tiny_llama(2, seed=1, **WIDE)), teacher


def answered(pair, prompts, alpha, new_tokens, seed=0, ends=(), vocab_size=VOCABULARY, section=SECTION):
    student, teacher = pair
    engines = tuple(engine_of(lm, section) for lm in pair)
    how = Draw(student, teacher, alpha, Decoding(new_tokens, ends), vocab_size)
    return draw(how, engines, prompts, draw_uniforms(seed, new_tokens, len(prompts)))


def transform(rollout, law):
    """The randomised probability integral transform of tokens under a law [N, V]: uniform, if drawn from it."""
    tokens = rollout.token_ids[rollout.mask]
    place = torch.rand(len(tokens), dtype=torch.float64)
    below = law.double().cumsum(1).gather(1, tokens[:, None])[:, 0]
    return below - place * law.double().gather(1, tokens[:, None])[:, 0]


def chi_square(values, bins=50):
    counts = torch.histc(values, bins, 0, 1)
    expected = len(values) / bins
    return float(((counts - expected) ** 2).sum() / expected)


@torch.no_grad()
def test_a_mixture_of_two_engines_is_the_exact_mixture(pair):
    """85.4 is the 99.9 % point of 49 degrees of freedom."""
    student, teacher = pair
    prompts = [[1 + i % 200, 2, 3 + i % 7] for i in range(1024)]
    rollout = drawn(answered(pair, prompts, 0.3, 30), torch.device("cpu"))
    assert len(rollout.token_ids[rollout.mask]) == 30 * 1024
    assert float(rollout.from_teacher.float().mean()) == pytest.approx(0.3, abs=0.01)
    found = read(rollout, student, teacher, 0.3, student_states=True)
    laws = [
        lm.head.logits(states[rollout.mask]).softmax(-1)
        for lm, states in ((student, found.student_hidden), (teacher, found.teacher_hidden))
    ]
    mixture = 0.7 * laws[0] + 0.3 * laws[1]
    assert chi_square(transform(rollout, mixture)) < 85
    assert chi_square(transform(rollout, laws[0])) > 85
    assert chi_square(transform(rollout, laws[1])) > 85
    # what the two drew is their own too
    mine = rollout.from_teacher[rollout.mask]
    for law, drew in zip(laws, (~mine, mine), strict=True):
        assert chi_square(transform(rollout, law)[drew]) < 85
    assert float(engine_gap(found)) < 1e-3
    torch.testing.assert_close(
        found.mixture_logprobs,
        mixture_logprobs(found.student_logprobs, found.teacher_logprobs, 0.3, rollout.mask),
    )


def test_a_rollout_is_a_function_of_its_uniforms(pair):
    prompts = [[5, 6], [7, 8, 9], [10]]
    first, alone = answered(pair, prompts, 0.5, 12, seed=3), answered(pair, prompts, 0.5, 12, seed=3)
    assert [each.token_ids for each in first] == [each.token_ids for each in alone]
    assert [each.token_ids for each in answered(pair, prompts, 0.5, 12, seed=4)] != [each.token_ids for each in first]


def test_responses_end_where_ours_end(pair):
    prompts, ends = [[1 + i, 2] for i in range(64)], (17, 201, 250)
    responses = [each.token_ids for each in answered(pair, prompts, 0.5, 20, ends=ends)]
    assert any(len(tokens) < 20 for tokens in responses)
    for tokens in responses:
        assert all(token not in ends for token in tokens[:-1])
        assert len(tokens) == 20 or tokens[-1] in ends


def test_columns_that_only_one_model_has_are_never_drawn(make_llama):
    student = CausalLM(make_llama(2, vocab_size=40, **WIDE))
    prompts = [[1 + i % 9, 2] for i in range(64)]
    engine = engine_of(student, SECTION)
    how = Draw(student, None, 0.0, Decoding(20, ()), 10)
    responses = draw(how, (engine, None), prompts, draw_uniforms(0, 20, 64))
    assert max(max(each.token_ids) for each in responses) < 10
    rollout = read(drawn(responses, student.device), student, None, 0.0, vocab_size=10)
    assert float(engine_gap(rollout)) < 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_an_engine_has_the_weights_of_the_moment(make_llama, tied):
    """And torch's generator and thread count are left as they were."""
    student = CausalLM(make_llama(2, seed=8, tie_word_embeddings=tied, **WIDE))
    before = torch.get_rng_state()
    engine, prompts = engine_of(student, SECTION), [[1 + i, 2] for i in range(16)]
    how = Draw(student, None, 0.0, Decoding(10, ()), VOCABULARY)

    def gap():
        rollout = drawn(draw(how, (engine, None), prompts, draw_uniforms(0, 10, 16)), student.device)
        return read(rollout, student, None, 0.0), rollout

    first, answers = gap()
    assert float(engine_gap(first)) < 1e-3 and torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.005 * torch.randn_like(parameter)
    stale = read(answers, student, None, 0.0)  # what the weights before have drawn
    second, _ = gap()
    assert float(engine_gap(second)) < 1e-3 < 0.02 < float(engine_gap(stale))
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1


# ---- a server


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


DRAWS = ("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm")
GIVES_STATES = ("--runner", "pooling", "--convert", "embed", "--pooler-config", '{"task": "token_embed"}')


class Serving:
    """`vllm serve` of a model directory, ready."""

    def __init__(self, model, log, flags=DRAWS):
        self.port = free_port()
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port",
            str(self.port), "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**27),
            "--max-model-len", "128", *flags,
        ]  # fmt: skip
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        until = time.monotonic() + 400
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)

    def answers(self):
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def wide_files(files, make_llama):
    for name, model in (("teacher", make_llama(3, **WIDE)), ("student", make_llama(2, seed=1, **WIDE))):
        model.save_pretrained(files / name)
    return files


@pytest.fixture
def server(wide_files):
    serving = Serving(wide_files / "student", wide_files / "server.log")
    yield serving
    serving.kill()


FLAGS = ["--engine.memory=0.125", "--rollout.engine=vllm", "--engine.retries=1"]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_server_gets_the_weights_and_its_death_ends_the_run_saved(server, wide_files, capsys):
    """α = 0 by a server: steps that learn, then SIGKILL. That the run then goes on is in test_pair.py."""
    recipe, run = str(wide_files / "recipe.yaml"), wide_files / "run"
    flags = [
        *FLAGS, "--rollout.alpha=0", "--stages.minillm.rollout.epochs=1", "--stages.minillm.rollout.batch_size=8",
        "--stages.minillm.optim.steps=20", "--log.checkpoint_every=0", "--stages.minillm.rollout.max_new_tokens=40",
    ]  # fmt: skip

    def kill():
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 6:
            time.sleep(0.05)
        server.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    assert cli.main(["train", recipe, "--no-doctor", *flags, f"--engine.url={server.url}"]) == 2
    killer.join()
    message = capsys.readouterr().err
    assert "does not answer" in message and "engine.retries" in message and "--resume" in message
    done = metrics(run)
    assert [line["step"] for line in done] == list(range(1, len(done) + 1))
    assert all(line["rollout/engine_gap"] < 1e-3 for line in done if line["stage"] == "minillm")
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [f"step-{len(done)}"]


@torch.no_grad()
def test_a_teacher_in_vllm_is_the_teacher(wide_files):
    """Its hidden states, twice, so that what it keeps of a prompt is no answer to the next; and a run that learns from
    them."""
    serving = Serving(wide_files / "teacher", wide_files / "server.log", GIVES_STATES)
    try:
        settings, here = TeacherConfig(provider="vllm"), CausalLM(load_model(str(wide_files / "teacher")))
        teacher = VllmTeacher([serving.url], settings, torch.device("cpu"))
        batch = collate([[5, 9, 33, 7], [8, 2], [5, 9, 33, 7]], [[6, 7, 8], [3], [6, 7, 8, 9, 10]])
        for _ in range(2):
            torch.testing.assert_close(teacher.output(batch).states, here.output(batch).states, rtol=1e-4, atol=1e-4)
        assert torch.equal(teacher.head.weight, here.head.weight)
        teacher.close()
        losses = {}
        for name, flags in (("here", []), ("there", [f"--model.teacher={serving.url}", "--teacher.provider=vllm"])):
            run = ["--stages.minillm.method=kd", "--log.checkpoint_every=0", f"--output={wide_files / name}", *flags]
            with torch.enable_grad():
                assert cli.main(["train", str(wide_files / "recipe.yaml"), "--no-doctor", *run]) == 0
            losses[name] = [line["loss"] for line in metrics(wide_files / name)]
        assert losses["there"] == pytest.approx(losses["here"], rel=1e-3)
    finally:
        serving.kill()


# ---- whole steps, in this process


@pytest.mark.parametrize(
    ("method", "flags", "gap"),
    [
        ("minillm", ["--rollout.alpha=0"], 1e-3),
        ("minillm", ["--rollout.alpha=0.3", "--rollout.engine_correction=2", "--model.compute_dtype=bfloat16"], 0.1),
        ("gkd", ["--rollout.on_policy=1"], 1e-3),
        ("seqkd", [], None),
    ],
)
def test_a_stage_learns_from_an_engine(wide_files, method, flags, gap):
    run = wide_files / "run"
    sizes = ["--rollout.batch_size=8", "--rollout.epochs=1", "--rollout.max_new_tokens=8", "--optim.steps=2"]
    only = [
        f"--stages.minillm.method={method}",
        "--stages.warm-up.optim.steps=1",
        "--stages.warm-up.rollout.engine=builtin",
    ]
    arguments = ["train", str(wide_files / "recipe.yaml"), "--no-doctor", *FLAGS, *flags, *sizes, *only]
    assert cli.main(arguments) == 0
    lines = [line for line in metrics(run) if line["stage"] == "minillm"]
    assert lines and all(line["grad_norm"] > 0 for line in lines)
    if gap:
        assert all(0 < line["rollout/engine_gap"] < gap for line in lines)
