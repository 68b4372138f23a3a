"""Runs and evaluations whose text comes from servers, and servers that die."""

import json
import os
import subprocess
import sys

import pytest

from minillm import cli
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError


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
