"""A teacher that is stored: what it says is kept to the bit, found by its tokens, and never taken for another's."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from minillm.cli import main
from minillm.config.schema import ConfigError
from minillm.teacher import store
from minillm.teacher.stored import StoredTeacher

LIMITS = ["--data.max_prompt_length=64", "--data.max_response_length=16"]


@pytest.fixture
def write(files):
    """Write what the tiny teacher says of train.jsonl."""

    def run(*flags, out="kept"):
        command = ["teach", str(files / "teacher"), f"--data={files / 'train.jsonl'}", f"--out={files / out}"]
        assert main([*command, *LIMITS, *flags]) == 0
        return files / out

    return run


def recipe(files, *loss):
    tree = (files / "recipe.yaml").read_text().partition("stages:")[0]
    optim = {"steps": 4, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-3}
    path = files / "kd.yaml"
    path.write_text(tree + "stages: " + json.dumps({"a": {"method": "kd", "optim": optim, "loss": dict(loss)}}))
    return path


def train(files, teacher, name, *flags, command="train"):
    arguments = [command, str(recipe(files)), "--no-doctor", f"--output={files / name}", *flags]
    assert main([*arguments, *([f"--model.teacher={teacher}"] if teacher else [])]) == 0
    lines = [json.loads(line) for line in (files / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def test_a_run_on_stored_states_is_the_run_on_the_teacher(files, write, capsys):
    flags = ["--data.packing=true", "--data.train_on=all", "--validation.every=2"]
    kept = write("--data.train_on=all")
    told = capsys.readouterr().out
    assert "132 bytes each" in told and "GiB free" in told  # 32 numbers of float32, and a position
    expected = train(files, "", "here", *flags)
    assert train(files, kept, "there", *flags) == pytest.approx(expected, rel=1e-4)
    assert "hidden states in float32" in capsys.readouterr().out


def test_distill_evaluates_a_student_whose_teacher_is_stored(files, write, capsys):
    train(files, write(), "run", command="distill")
    told = capsys.readouterr().out
    assert f"minillm evaluate {files / 'run' / 'model'} --data {files / 'eval.jsonl'} --teacher DIR" in told
    summary = json.loads((files / "run" / "summary.json").read_text())
    assert list(summary["evaluations"]) == ["start", "a"] and "stored in" in summary["teacher"]["elsewhere"]


@pytest.mark.parametrize(("states", "rel"), [("bfloat16", 2e-3), ("float8", 3e-2)])
def test_narrower_states_are_near(files, write, states, rel):
    kept = write(f"--states={states}")
    assert train(files, kept, "there") == pytest.approx(train(files, "", "here"), rel=rel)


def test_top_k_is_another_loss_by_name_and_says_what_it_leaves_out(files, write, capsys):
    kept = write("--top-k=200", f"--student={files / 'student'}")
    told = capsys.readouterr().out
    assert "outside of the top tokens" in told and "forward_kl" in told
    measured = json.loads((kept / "index.json").read_text())["measured"]
    assert 0 < measured["forward_kl/top_k"] < measured["forward_kl"]
    assert 0 < measured["entropy/top_k"] < measured["entropy"]
    assert main(["train", str(recipe(files)), f"--model.teacher={kept}"]) == 2
    assert "set it to top_k, which is another loss" in capsys.readouterr().err
    losses = train(files, kept, "there", "--loss.support=top_k")
    assert losses == pytest.approx(train(files, "", "here"), rel=2e-2)  # all but 57 tokens


def test_the_temperature_of_top_tokens_is_that_of_the_loss(files, write, capsys):
    kept = write("--top-k=200", "--temperature=2")
    flags = [f"--model.teacher={kept}", "--loss.support=top_k"]
    assert main(["train", str(recipe(files)), *flags]) == 2
    assert "were kept at 2" in capsys.readouterr().err
    losses = train(files, kept, "there", "--loss.support=top_k", "--loss.temperature=2")
    assert losses == pytest.approx(train(files, "", "here", "--loss.temperature=2"), rel=2e-2)


def test_the_doctor_examines_stored_teachers(files, write, capsys):
    for kept, flags in ((write(), []), (write("--top-k=20", out="top"), ["--loss.support=top_k"])):
        assert main(["doctor", str(recipe(files)), f"--model.teacher={kept}", *flags]) == 0
        told = capsys.readouterr().out
        assert "ok       formula of the loss" in told and "ok       teacher knows something" in told


def test_other_data_are_refused_by_record(files, write, capsys):
    kept = write()
    rows = (files / "train.jsonl").read_text().splitlines(keepends=True)
    for changed in ([*rows[:5], rows[5].replace('"output": "', '"output": "x '), *rows[6:]], rows):
        (files / "train.jsonl").write_text("".join(changed))
        flags = [] if changed != rows else ["--data.prompt_template=Q: {prompt} A:"]
        assert main(["train", str(recipe(files)), f"--model.teacher={kept}", *flags]) == 2
        where = "record 6" if changed != rows else "record 1"
        assert f"{where}: {kept} does not hold what the teacher says of it" in capsys.readouterr().err


def test_shorter_answers_are_prefixes_and_longer_ones_are_refused(files, write, capsys):
    kept = write()
    short = "--data.max_response_length=3"
    assert train(files, kept, "there", short) == pytest.approx(train(files, "", "here", short), rel=1e-4)
    assert main(["train", str(recipe(files)), f"--model.teacher={write(short, out='short')}"]) == 2
    assert "does not hold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method=gkd"], "asks the teacher about answers that do not exist yet"),
        (["--method=seqkd"], "asks the teacher about answers that do not exist yet"),
        (["--model.student=", "--model.drop_layers=[1,2]"], "name a model.student"),
        (["--teacher.dtype=float32"], "the teacher is stored"),
    ],
)
def test_settings_that_a_stored_teacher_cannot_have_are_refused(files, write, flags, words, capsys):
    text = (files / "recipe.yaml").read_text().partition("stages:")[0]
    (files / "plain.yaml").write_text(text)
    method = [] if flags[0].startswith("--method") else ["--method=kd"]
    assert main(["train", str(files / "plain.yaml"), f"--model.teacher={write()}", *method, *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_teacher_of_another_tokenizer_is_refused(files, write, make_tokenizer, capsys):
    kept = write()
    make_tokenizer(reverse=True).save_pretrained(files / "student")
    assert main(["train", str(recipe(files)), f"--model.teacher={kept}"]) == 2
    assert "another tokenizer than the student's" in capsys.readouterr().err


# ---- a directory that is not whole


@pytest.fixture
def small_shards(monkeypatch):
    plan_of = store.plan_of
    monkeypatch.setattr(store, "plan_of", lambda *a, **k: plan_of(*a, **k, shard_bytes=1200))


def test_writing_goes_on_where_it_was_stopped_and_gives_the_same(files, write, small_shards, monkeypatch, capsys):
    whole = write("--states=bfloat16")
    shards = sorted(whole.glob("shard-*"))
    assert len(shards) >= 3
    written, real = [], store._write

    def stop(path, tensors):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        real(path, tensors)

    monkeypatch.setattr(store, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        write("--states=bfloat16", out="cut")
    monkeypatch.setattr(store, "_write", real)
    with pytest.raises(ConfigError, match=rf"is not whole: 1 of {len(shards)} shards"):
        StoredTeacher(files / "cut", torch.device("cpu"))
    capsys.readouterr()
    cut = write("--states=bfloat16", out="cut")
    assert f"1 of {len(shards)} shards are there already" in capsys.readouterr().out
    for shard in shards:
        assert (cut / shard.name).read_bytes() == shard.read_bytes()


def test_a_kill_leaves_nothing_that_is_taken_for_whole(files, small_shards, write):
    """kill -9 as soon as a shard is there."""
    command = [
        sys.executable, "-c",
        "from minillm.teacher import store; plan = store.plan_of\n"
        "store.plan_of = lambda *a, **k: plan(*a, **k, shard_bytes=1200)\n"
        "from minillm.cli import main; import sys; main(sys.argv[1:])",
        "teach", str(files / "teacher"), f"--data={files / 'train.jsonl'}", f"--out={files / 'cut'}", *LIMITS,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((files / "cut").glob("shard-*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (files / "cut" / "index.json").exists():
        with pytest.raises(ConfigError, match="is not whole"):
            StoredTeacher(files / "cut", torch.device("cpu"))
    whole, cut = write(), write(out="cut")
    for shard in whole.glob("shard-*"):
        assert (cut / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "gone", "index", "plan", "head"])
def test_damage_is_found_when_it_is_opened(files, write, damage):
    kept = write()
    (shard,) = kept.glob("shard-*")
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif damage == "gone":
        shard.unlink()
    else:
        name = {"index": "index.json", "plan": "teacher.json", "head": "head.safetensors"}[damage]
        (kept / name).write_bytes((kept / name).read_bytes()[:-8])
    with pytest.raises(ConfigError, match=str(kept)):
        StoredTeacher(kept, torch.device("cpu"))


def test_a_directory_of_something_else_is_left_alone(files, write, capsys):
    kept = write()
    command = ["teach", str(files / "teacher"), f"--data={files / 'train.jsonl'}", *LIMITS]
    assert main([*command, f"--out={kept}", "--top-k=3"]) == 2
    assert "name another --out" in capsys.readouterr().err
    assert main([*command, f"--out={files / 'student'}"]) == 2
    assert "name another --out" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_said_before(files, monkeypatch, capsys):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    command = ["teach", str(files / "teacher"), f"--data={files / 'train.jsonl'}", f"--out={files / 'kept'}"]
    assert main([*command, *LIMITS]) == 2
    assert "make room, keep fewer" in capsys.readouterr().err and not list((files / "kept").glob("shard-*"))
