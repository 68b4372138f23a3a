"""Runs whose teacher is on a server: the same training as with the teacher here; and one that is killed."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from minillm.cli import main
from minillm.run.directory import RunDirectory

SHORT = ["--no-doctor", "--log.checkpoint_every=0"]


def recipe(files, method):
    tree = (files / "recipe.yaml").read_text().partition("stages:")[0]
    stages = {
        "kd": {"method": "kd"},
        "gkd": {"method": "gkd", "rollout": {"on_policy": 0.6, "max_new_tokens": 6}},
        "seqkd": {"method": "seqkd", "rollout": {"max_new_tokens": 6, "batch_size": 5}},
        "minillm": {
            "method": "minillm",
            "rollout": {"alpha": 0.0, "batch_size": 8, "max_new_tokens": 6, "epochs": 1},
            "objective": {"pt_teacher": 0.5, "pt_length": 16, "pt_batch_size": 2},
        },
    }
    optim = {"steps": 4, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-3}
    path = files / f"{method}.yaml"
    path.write_text(tree + "stages: " + json.dumps({"a": stages[method] | {"optim": optim}}))
    return path


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("method", ["kd", "gkd", "seqkd", "minillm"])
def test_a_served_teacher_teaches_what_the_teacher_teaches(files, serve, method, capsys):
    path = recipe(files, method)
    evaluated = method == "kd"
    command = ["distill" if evaluated else "train", str(path), "--data.packing=true", *([] if evaluated else SHORT)]
    assert main([*command, f"--output={files / 'here'}"]) == 0
    served = serve().url
    assert main([*command, f"--output={files / 'there'}", f"--model.teacher={served}"]) == 0, capsys.readouterr()
    assert losses(files / "there") == pytest.approx(losses(files / "here"), rel=1e-4)
    told = capsys.readouterr().out
    assert f"tiny on {served}" in told
    if not evaluated:
        return
    here, there = (json.loads((files / run / "summary.json").read_text()) for run in ("here", "there"))
    measured = [each["evaluations"]["a"]["reverse_kl"]["own_samples"]["mean"] for each in (here, there)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)
    assert served in there["teacher"]["elsewhere"]
    assert list(there["evaluations"]) == list(here["evaluations"]) == ["start", "a", "teacher"]
    for measured in ("rouge_l", "length", "responses"):
        assert there["evaluations"]["teacher"][measured] == here["evaluations"]["teacher"][measured]


class Process:
    """`minillm teach` as users start it."""

    def __init__(self, model):
        command = [sys.executable, "-m", "minillm", "teach", str(model), "--port=0"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.url = re.search(r"http://\S+:\d+", self.process.stdout.readline())[0]

    def end(self, number):
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def process(files):
    pytest.importorskip("uvicorn", reason="the extra `teach`")
    started = []

    def start():
        started.append(Process(files / "teacher"))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def test_a_run_whose_teacher_is_killed_is_saved_and_goes_on(files, process, serve, monkeypatch, capsys):
    path, server = recipe(files, "kd"), process()
    command = [
        "train",
        str(path),
        *SHORT,
        f"--model.teacher={server.url}",
        "--teacher.patience=1",
        "--teacher.prefetch=1",
    ]
    assert main([*command, f"--output={files / 'whole'}"]) == 0

    log = RunDirectory.log
    monkeypatch.setattr(
        RunDirectory, "log", lambda self, *a: (log(self, *a), a[1] == 2 and server.end(signal.SIGKILL))[0]
    )
    assert main([*command, f"--output={files / 'cut'}"]) == 2
    told = capsys.readouterr().err
    assert "the teacher has not answered for 1 s" in told and "--resume" in told
    assert (files / "cut" / "checkpoints" / "step-2" / "DONE").exists()

    monkeypatch.setattr(RunDirectory, "log", log)
    serve(port=int(server.url.rpartition(":")[2]))
    assert main([*command, f"--output={files / 'cut'}", "--resume=auto"]) == 0
    assert losses(files / "cut") == losses(files / "whole")


def test_the_teacher_is_asked_about_the_next_step_before_this_one_is_learnt_from(files, serve, monkeypatch):
    from minillm.teacher.served import ServedTeacher

    told, ask, output = [], ServedTeacher.ask, ServedTeacher.output
    monkeypatch.setattr(ServedTeacher, "ask", lambda self, batch: (told.append("ask"), ask(self, batch))[1])
    monkeypatch.setattr(ServedTeacher, "output", lambda self, batch: (told.append("use"), output(self, batch))[1])
    flags = [f"--model.teacher={serve().url}", "--teacher.prefetch=1", "--optim.micro_batch_size=4"]
    assert main(["train", str(recipe(files, "kd")), *SHORT, *flags]) == 0
    assert told == ["ask", *["ask", "use"] * 3, "use"]


def test_a_signal_ends_a_server_with_status_0(process):
    server = process()
    assert server.end(signal.SIGTERM) == 0 and "stopped" in server.process.stdout.read()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host=0.0.0.0"], "MINILLM_TEACHER_TOKEN"),
        (["--port=70000"], "nothing can listen"),
        (["--queue=0"], "at least 1"),
        (["--nonsense=1"], "does not know"),
    ],
)
def test_what_cannot_be_served_is_refused(files, flags, words, capsys):
    pytest.importorskip("uvicorn", reason="the extra `teach`")
    assert main(["teach", str(files / "teacher"), *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.teacher=http://127.0.0.1:1", "--teacher.patience=0"], "has not answered"),
        (["--model.teacher=http://"], "expected http://HOST:PORT"),
        (["--model.teacher=http://a:1", "--teacher.dtype=float32"], "give --dtype to `minillm teach`"),
        (["--model.teacher=http://a:1", "--teacher.wire=int8"], "teacher.wire"),
        (["--model.teacher=http://a:1", "--model.student=", "--model.drop_layers=[1,2]"], "name a model.student"),
        (["--model.teacher=http://a:1", "--method=minillm"], "rollout.coins to a number"),
        (["--loss.support=top_k"], "set it to full"),
    ],
)
def test_settings_that_a_served_teacher_cannot_have_are_refused(files, flags, words, capsys):
    text = (files / "recipe.yaml").read_text().partition("stages:")[0]
    (files / "plain.yaml").write_text(text)
    method = [] if any(flag.startswith("--method") for flag in flags) else ["--method=kd"]
    assert main(["train", str(files / "plain.yaml"), *method, *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_teacher_of_another_tokenizer_is_refused(files, serve, make_tokenizer, capsys):
    make_tokenizer(reverse=True).save_pretrained(files / "student")
    assert main(["train", str(recipe(files, "kd")), f"--model.teacher={serve().url}"]) == 2
    assert "another tokenizer than the student's" in capsys.readouterr().err


def test_the_doctor_examines_a_run_with_a_served_teacher(files, serve, capsys):
    assert main(["doctor", str(recipe(files, "kd")), f"--model.teacher={serve().url}"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"ok +formula of the loss", told) and re.search(r"ok +teacher knows something", told)
