"""What needs no vLLM: who draws which token, requests that fail and are sent again, laws, weights, and what is learnt.

The server is one of the standard library's, which draws from one of our own models token by token.
"""

import dataclasses
import gc
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm import cli
from minillm.config.engine import EngineConfig
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError, LoraConfig, ObjectiveConfig
from minillm.engine import Answer, EngineLost, law_of, pair
from minillm.engine.pair import ENGINES, Draw, draw, engine_of
from minillm.engine.responses import Voice, responses_to, write
from minillm.engine.rollout import drawn, engine_gap, engine_weights, read
from minillm.engine.vllm_server import Server
from minillm.engine.weights import weights_of
from minillm.model.adapters import add_adapters
from minillm.model.head import CausalLM
from minillm.model.load import load_model
from minillm.model.sampling import Decoding, draw_uniforms
from minillm.train.minillm import policy_constants

QUICK = EngineConfig(retries=2, timeout=20)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("minillm.engine.vllm_server.LONGEST_PAUSE", 0.01)


class Recorder:
    """An engine that answers number i of a request with tokens of its own, and keeps what it was asked."""

    def __init__(self, token, at_once=1):
        self.token, self.at_once, self.asked, self.begun = token, at_once, [], []

    def submit(self, number, request, law):
        self.asked.append((number, list(request.prompt), request.max_tokens, request.seed))
        self.begun.append((number, Answer([self.token] * request.max_tokens, [-1.0] * request.max_tokens)))

    def finished(self):
        now, self.begun = self.begun[: self.at_once], self.begun[self.at_once :]
        return now


def test_the_student_writes_up_to_the_next_turn_of_the_teacher():
    coins = torch.tensor([[0, 0, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    uniforms = torch.stack([1 - coins.T.double() * 0.9, torch.arange(15).view(5, 3) / 2**53], dim=2)
    uniforms[..., 0].clamp_(max=0.99)
    responses = responses_to([[7], [8, 9], [5]], (), 0.5, uniforms)
    student, teacher = Recorder(1), Recorder(2)
    write(responses, Voice(student, {}), Voice(teacher, {}))
    assert [each.token_ids for each in responses] == [[1, 1, 2, 1, 2], [2, 2, 1, 1, 1], [1] * 5]
    assert sorted(student.asked) == [
        (0, [7], 2, 0),
        (0, [7, 1, 1, 2], 1, 9),
        (1, [8, 9, 2, 2], 3, 7),
        (2, [5], 5, 2),
    ]
    assert sorted(teacher.asked) == [
        (0, [7, 1, 1], 1, 6),
        (0, [7, 1, 1, 2, 1], 1, 12),
        (1, [8, 9], 1, 1),
        (1, [8, 9, 2], 1, 4),
    ]


def test_nothing_is_asked_after_an_end():
    responses = responses_to([[7], [8]], (2,), 1.0, torch.full((6, 2, 2), 0.5))
    student, teacher = Recorder(1), Recorder(2)
    write(responses, Voice(student, {}), Voice(teacher, {}))
    assert [each.token_ids for each in responses] == [[2], [2]] and not student.asked and len(teacher.asked) == 2


def test_columns_that_do_not_count_are_ruled_out():
    law = law_of(Decoding(4, (3, 9), temperature=0.5, top_k=7, top_p=0.9), 250, 252)
    assert law["logit_bias"] == {250: -100.0, 251: -100.0} and law["stop_token_ids"] == [3, 9]
    assert (law["temperature"], law["top_k"], law["top_p"], law["ignore_eos"]) == (0.5, 7, 0.9, True)
    assert law_of(Decoding(4, ()), 250, 250)["logit_bias"] is None


# ---- a server


class Service:
    """Serves one of our models; `troubles` are what happens to the next requests: a status, or "cut"."""

    def __init__(self, lm, longest=512):
        self.lm, self.longest = lm, longest
        self.troubles, self.asked, self.version, self.reloads, self.resets = [], [], "default", [], []
        service, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(service.get(self.path))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    trouble = service.troubles.pop(0) if service.troubles else None
                    if trouble == "cut":
                        return self.close_connection
                    if trouble == "restart":
                        service.version, trouble = "default", 503
                    if trouble is not None:
                        return self.send_error(trouble)
                    self.reply(service.post(self.path, body))

            def reply(self, value):
                data = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        class Plain(http.server.ThreadingHTTPServer):
            request_queue_size = 256

        self.server = Plain(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def get(self, path):
        if path == "/v1/models":
            return {"data": [{"id": "it", "max_model_len": self.longest}]}
        assert path == "/weight_info"
        return {"weight_version": self.version}

    @torch.no_grad()
    def post(self, path, body):
        if path == "/collective_rpc":
            self.reloads.append(body["kwargs"]["weights_path"])
            self.lm = CausalLM(load_model(self.reloads[-1]))
        elif path == "/reset_prefix_cache" and self.resets:
            return {"success": self.resets.pop(0)}
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/v1/completions":
            self.asked.append(body)
            generator = torch.Generator().manual_seed(body["seed"])
            tokens, logprobs = list(body["prompt"]), []
            for _ in range(body["max_tokens"]):
                logits = self.lm.model(torch.tensor([tokens])).logits[0, -1]
                for column, bias in (body["logit_bias"] or {}).items():
                    logits[int(column)] += bias
                law = (logits / (body["temperature"] or 1.0)).log_softmax(-1)
                greedy = body["temperature"] == 0
                token = int(law.argmax() if greedy else torch.multinomial(law.exp(), 1, generator=generator))
                tokens.append(token)
                logprobs.append(float(law[token]))
                if token in body["stop_token_ids"]:
                    break
            written = tokens[len(body["prompt"]) :]
            return {"choices": [{"token_ids": written, "logprobs": {"token_logprobs": logprobs}}]}
        return {}

    def close(self):
        self.server.shutdown()
        self.server.server_close()


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


def answers(lm, service, prompts=((5, 6), (7,)), new_tokens=6, config=QUICK, seed=0):
    engine = engine_of(lm, dataclasses.replace(config, url=service.url, teacher_url=service.url))
    how = Draw(lm, None, 0.0, Decoding(new_tokens, ()), lm.vocab_size)
    return draw(how, (engine, None), prompts, draw_uniforms(seed, new_tokens, len(prompts)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_server_is_given_the_weights_before_each_rollout(serve, make_llama, tied):
    student = CausalLM(make_llama(2, seed=1, tie_word_embeddings=tied))
    service = serve(CausalLM(make_llama(2, seed=9)))
    for _ in range(2):
        rollout = read(drawn(answers(student, service), student.device), student, None, 0.0)
        assert float(engine_gap(rollout)) < 1e-5
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    assert len(service.reloads) == 2 and service.version != "default"


def test_a_prefix_cache_of_other_weights_is_not_used(serve, student):
    service = serve(student)
    service.resets = [False, False, True]
    answers(student, service)
    assert service.resets == []
    service.resets = [False] * 3
    with pytest.raises(EngineLost, match="still in use"):
        answers(student, service)


def test_a_frozen_model_is_never_pushed(serve, teacher):
    service = serve(teacher)
    answers(teacher, service)
    assert service.reloads == [] and service.version == "default"


@pytest.mark.parametrize("trouble", ["cut", 500, 503, 429])
def test_requests_that_fail_for_a_while_are_sent_again(serve, teacher, trouble):
    service = serve(teacher)
    expected = answers(teacher, service)
    service.troubles = [trouble, trouble]
    again = answers(teacher, service)
    assert [each.token_ids for each in again] == [each.token_ids for each in expected]
    assert not service.troubles


def test_a_server_that_was_started_anew_gets_the_weights_again(serve, student, make_llama):
    service = serve(CausalLM(make_llama(2, seed=9)))
    expected = [each.token_ids for each in answers(student, service)]
    service.troubles = [None, None, None, "restart"]  # after the push, at the first completion
    assert [each.token_ids for each in answers(student, service)] == expected
    assert len(service.reloads) == 3 and service.version != "default"


def test_a_server_that_stays_away_is_given_up(serve, teacher):
    service = serve(teacher)
    answers(teacher, service)
    service.troubles = ["cut"] * 100
    with pytest.raises(EngineLost, match=r"does not answer .* in 3 attempts \(engine.retries, engine.timeout\)"):
        answers(teacher, service)
    assert len(service.troubles) >= 100 - 3 * 2
    service.troubles = []
    assert answers(teacher, service)  # a loss is no state: the next rollout may find it again


def test_what_a_server_refuses_is_not_sent_again(serve, teacher):
    service = serve(teacher)
    answers(teacher, service)
    service.troubles = [400]
    with pytest.raises(EngineLost, match=r"/v1/completions refuses a request \(400"):
        answers(teacher, service, prompts=[[5]])
    assert not service.troubles


def test_a_server_is_looked_for_at_once(serve, teacher, student):
    with pytest.raises(ConfigError, match=r"no vLLM server answers at http://127.0.0.1:9 .*engine.url"):
        Server("http://127.0.0.1:9", QUICK, None)
    with pytest.raises(ConfigError, match="sequences of 4 tokens, and prompt and answer may reach 8"):
        answers(teacher, serve(teacher, longest=4))


def test_without_vllm_an_engine_in_this_process_is_refused(student, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"needs vLLM.*pip install vllm.*engine.url"):
        engine_of(student, QUICK)


def test_an_engine_does_not_keep_its_model(serve, make_llama):
    lm = CausalLM(make_llama(2))
    answers(lm, serve(lm))
    before = len(ENGINES)
    del lm
    gc.collect()
    assert len(ENGINES) < before


# ---- what is learnt


def test_the_gap_and_the_correction_are_of_the_model_that_drew(serve, student, teacher):
    config = dataclasses.replace(QUICK, url=serve(student).url, teacher_url=serve(teacher).url)
    engines = engine_of(student, config), engine_of(teacher, config)
    how = Draw(student, teacher, 0.4, Decoding(8, ()), 257)
    rollout = drawn(draw(how, engines, [[5], [6], [7], [8]], draw_uniforms(0, 8, 4)), student.device)
    found = read(rollout, student, teacher, 0.4, student_states=True)
    assert float(engine_gap(found)) < 1e-5 and 0 < int(found.from_teacher.sum()) < 32
    mixture = torch.log(0.4 * found.teacher_logprobs.exp() + 0.6 * found.student_logprobs.exp())
    torch.testing.assert_close(found.mixture_logprobs, mixture, rtol=1e-4, atol=1e-5)
    for states, lm, logprobs in (
        (found.student_hidden, student, found.student_logprobs),
        (found.teacher_hidden, teacher, found.teacher_logprobs),
    ):
        law = lm.logits(states).log_softmax(-1)
        torch.testing.assert_close(law.gather(2, rollout.token_ids[..., None])[..., 0], logprobs)

    off = found._replace(engine_logprobs=found.engine_logprobs - torch.tensor([0.0, 0.1, 1.0, -0.2])[:, None])
    assert float(engine_gap(off)) == pytest.approx(1.3 / 4, abs=1e-4)
    expected = torch.tensor([1.0, 1.1052, 2.0, 0.8187])[:, None].expand(4, 8)
    torch.testing.assert_close(engine_weights(off, 2.0), expected, rtol=1e-3, atol=1e-3)
    objective = ObjectiveConfig()
    for plain, corrected, weight in zip(
        policy_constants(off, objective), policy_constants(off, objective, 2.0), expected, strict=True
    ):
        torch.testing.assert_close(corrected.importance_weights, plain.importance_weights * weight, rtol=1e-3, atol=0)
        torch.testing.assert_close(corrected.advantages, plain.advantages)


def test_the_correction_makes_an_estimate_under_another_law_exact():
    """Σ_m P(m) Σ_y m_e(y) · m(y) / m_e(y) · f(y) is the mean of f under the mixture, for any engine's laws."""
    torch.manual_seed(0)
    q, p, q_engine, p_engine = torch.randn(4, 50, dtype=torch.float64).softmax(-1)
    f, alpha = torch.randn(50, dtype=torch.float64), 0.3
    estimate = alpha * (p_engine * (p / p_engine) * f).sum() + (1 - alpha) * (q_engine * (q / q_engine) * f).sum()
    torch.testing.assert_close(estimate, ((alpha * p + (1 - alpha) * q) * f).sum())


def test_an_engine_of_another_law_is_refused(serve, teacher, make_llama):
    service = serve(CausalLM(make_llama(3, seed=7)))
    with pytest.raises(ConfigError, match=r"nats per token off .*another law.*processed_logprobs"):
        read(drawn(answers(teacher, service), teacher.device), teacher, None, 0.0)


def test_weights_written_for_a_server_do_not_stay(serve, make_llama):
    lm = CausalLM(make_llama(2))
    service = serve(lm)
    answers(lm, service)
    (path,) = service.reloads
    assert Path(path).exists()
    del lm, service.lm
    gc.collect()
    assert not Path(path).parent.exists()


def test_adapters_are_merged_into_what_an_engine_gets(make_llama):
    pytest.importorskip("peft")
    base = make_llama(2)
    before, model = {k: v.clone() for k, v in base.state_dict().items()}, base
    add_adapters(model, LoraConfig(rank=2), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    found = weights_of(CausalLM(model), torch.float32)
    assert found.keys() == before.keys()
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


def test_weights_are_named_as_in_a_checkpoint(make_llama, tmp_path):
    model = make_llama(2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    stored, found = load_file(tmp_path / "model.safetensors"), weights_of(CausalLM(model), torch.bfloat16)
    assert found.keys() == stored.keys() | {"lm_head.weight"}  # tied, and packed apart by vLLM
    assert all(value.dtype == torch.bfloat16 for value in found.values())


# ---- runs


@pytest.fixture
def services(serve, files):
    """Servers of the pair in `files`, and the flags that name them."""
    made = [serve(CausalLM(load_model(str(files / name)))) for name in ("student", "teacher")]
    flags = ["--rollout.engine=vllm", "--engine.retries=1"]
    return made, [*flags, *(f"--engine.{key}={s.url}" for key, s in zip(("url", "teacher_url"), made, strict=True))]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("alpha", [0, 0.3])
def test_a_run_whose_server_dies_is_saved_and_goes_on(files, services, capsys, alpha):
    (student, _), flags = services
    flags = [*flags, f"--rollout.alpha={alpha}", "--stages.minillm.rollout.epochs=1", "--log.checkpoint_every=0"]
    recipe, run = str(files / "recipe.yaml"), files / "run"
    whole = str(files / "whole")
    assert cli.main(["train", recipe, "--no-doctor", *flags, f"--output={whole}"]) == 0
    begun = student.reloads.copy()
    student.troubles = [None] * 30 + ["cut"] * 1000
    assert cli.main(["train", recipe, "--no-doctor", *flags]) == 2
    message = capsys.readouterr().err
    assert "does not answer" in message and "--resume" in message
    done = metrics(run)
    assert 3 < len(done) < 8
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [f"step-{len(done)}"]
    student.troubles = []
    assert cli.main(["train", recipe, "--no-doctor", *flags, "--resume", "auto"]) == 0
    lines, expected = metrics(run), metrics(files / "whole")
    assert begun and [line["step"] for line in lines] == list(range(1, 9))
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert all(line["rollout/engine_gap"] < 1e-4 for line in lines if line["stage"] == "minillm")


def test_a_server_that_dies_before_the_first_step_of_a_stage_costs_no_stage_before(files, services, capsys):
    (_, teacher), flags = services
    flags = [
        *flags,
        "--stages.minillm.method=seqkd",
        "--log.checkpoint_every=0",
        "--stages.warm-up.validation.every=0",
    ]
    recipe, run = str(files / "recipe.yaml"), files / "run"
    flags.append("--rollout.batch_size=4")
    teacher.troubles = [None] * 9 + ["cut"] * 1000  # in the third batch of prompts
    assert cli.main(["train", recipe, "--no-doctor", *flags]) == 2
    assert "--resume" in capsys.readouterr().err and (run / "checkpoints" / "step-3" / "DONE").exists()
    assert len((run / "stages" / "minillm" / "teacher-answers.jsonl.unfinished").read_text().splitlines()) == 8
    teacher.troubles, teacher.asked = [], []
    assert cli.main(["train", recipe, "--no-doctor", *flags, "--resume", "auto"]) == 0
    assert [line["step"] for line in metrics(run)] == list(range(1, 9)) and len(teacher.asked) == 14 - 8


def test_two_processes_share_the_servers_and_lose_them_together(files, services):
    (student, _), flags = services
    flags = ["--no-doctor", "--eval.engine=vllm", "--rollout.alpha=0.3", "--log.checkpoint_every=0", *flags]

    def launch(name):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "minillm", "distill", str(files / "recipe.yaml"), *flags, f"--output={files / name}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)

    two = launch("two")
    assert two.returncode == 0, two.stderr[-3000:]
    pushes = len(student.reloads)
    assert cli.main(["distill", str(files / "recipe.yaml"), *flags, f"--output={files / 'one'}"]) == 0
    assert pushes == len(student.reloads) - pushes  # by one of them alone
    for a, b in zip(metrics(files / "one"), metrics(files / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)
    one, other = (json.loads((files / name / "evaluations" / "start.json").read_text()) for name in ("one", "two"))
    assert one["responses"] == other["responses"]
    assert one["reverse_kl"]["own_samples"]["mean"] == pytest.approx(other["reverse_kl"]["own_samples"]["mean"])

    student.troubles = [None] * (len(student.asked) // 3) + ["cut"] * 1000
    lost = launch("lost")
    assert lost.returncode != 0 and lost.stderr.count("does not answer") >= 2
    steps = len(metrics(files / "lost"))
    assert 0 < steps < 8 and (files / "lost" / "checkpoints" / f"step-{steps}" / "DONE").exists()


def test_gkd_and_the_teachers_answers_come_from_engines(files, services):
    (student, teacher), flags = services
    for method, served in (("gkd", student), ("seqkd", teacher)):
        only = [f"--stages.minillm.method={method}", "--rollout.on_policy=1", f"--output={files / method}"]
        assert cli.main(["train", str(files / "recipe.yaml"), "--no-doctor", *flags, *only]) == 0
        assert served.asked


def test_an_evaluation_is_answered_by_engines(files, services, capsys):
    """What a server draws is not what our decoder draws, but greedy answers are, and both are measured alike."""
    (student, teacher), flags = services
    sizes = ["--eval.samples=2", "--eval.sample_tokens=6", "--eval.greedy_tokens=6", "--eval.prompts=6"]
    sizes.append("--data.prompt_template=chat")
    arguments = ["evaluate", str(files / "student"), "--data", str(files / "eval.jsonl"), "--teacher"]
    found = []
    for more in ([], ["--eval.engine=vllm", *(flag for flag in flags if flag.startswith("--engine"))]):
        assert cli.main([*arguments, str(files / "teacher"), *sizes, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    builtin, engines = found
    assert len(student.asked) == 6 + 12 and len(teacher.asked) == 12 and student.reloads and not teacher.reloads
    assert engines["generation"] == builtin["generation"] | {"engine": "vllm"}
    assert [each["greedy"] for each in engines["responses"]] == [each["greedy"] for each in builtin["responses"]]
    for name, along in (("reverse_kl", "own_samples"), ("forward_kl", "teacher_samples")):
        assert engines[name][along]["mean"] == pytest.approx(builtin[name][along]["mean"], rel=0.6)


def test_the_section_is_checked(files):
    def refused(*flags):
        with pytest.raises(ConfigError) as error:
            load_recipe(files / "recipe.yaml", list(flags))
        return str(error.value)

    assert "value of rollout.engine" in refused("--rollout.engine=sglang")
    assert "value of eval.engine" in refused("--eval.engine=x")
    assert "value of engine.push" in refused("--engine.push=mail")
    assert "engine.url is 'here'" in refused("--engine.url=here")
    assert "engine.memory is 0" in refused("--engine.memory=0")
    assert "engine.retries is -1" in refused("--engine.retries=-1")
    assert "engine.address is 'x'" in refused("--engine.address=x")
    assert "rollout.engine_correction is -1" in refused("--rollout.engine_correction=-1")


def test_several_processes_need_a_server(student, monkeypatch):
    monkeypatch.setattr(pair, "PartialState", lambda: dataclasses.make_dataclass("S", [("num_processes", int, 2)])())
    with pytest.raises(ConfigError, match=r"run of 2 processes.*engine.url"):
        engine_of(student, QUICK)
