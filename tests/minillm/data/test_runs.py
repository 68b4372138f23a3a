"""Inputs through whole runs: what the trainer learns from them, and that none of them breaks one."""

import json
import re

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from minillm.cli import main
from minillm.config.check import MAX_SEED

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c"


@pytest.fixture
def train(files, make_tokenizer):
    """Trains one step of a method on rows of data; the exit status, and where the run is."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(files / name)
    tree = yaml.safe_load((files / "recipe.yaml").read_text(encoding="utf-8"))
    del tree["stages"], tree["smoke"], tree["output"]
    tree |= {"optim": {"steps": 1, "batch_size": 4}, "rollout": {"max_new_tokens": 4, "batch_size": 4, "epochs": 1}}
    tree |= {"objective": {"pt_weight": 0}, "log": {}}
    (files / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")

    def train(rows, method, name, *flags):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (files / "train.jsonl").write_text(lines, encoding="utf-8")
        run = files / name
        command = ["train", str(files / "recipe.yaml"), f"--method={method}", f"--output={run}", *flags]
        return main(command), run

    return train


def test_the_loss_is_that_of_every_turn(train, files, make_tokenizer):
    """One step on all of the data, against transformers' own logits and spans written out by hand."""
    learnt = [["Ho", "Hu"], ["Ja"], ["1", "22", "333"], ["Ho"]]
    rows = [
        {"messages": [turn for text in texts for turn in ({"role": "user", "content": f"Say {text}"},
                                                          {"role": "assistant", "content": text})]}
        for texts in learnt
    ]  # fmt: skip
    tokenizer, model = make_tokenizer(), AutoModelForCausalLM.from_pretrained(files / "student")
    sums = {"last": [0.0, 0], "all": [0.0, 0]}
    for texts in learnt:
        ids, counts = [], []
        for text in texts:
            for piece, count in (
                (f"[user]Say {text}<eos>\n[assistant]", False),
                (f"{text}<eos>", True),
                ("\n", False),
            ):
                tokens = tokenizer.encode(piece)
                ids += tokens
                counts += [count * (1 + (text == texts[-1]))] * len(tokens)
        with torch.no_grad():
            losses = cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
        for how, least in (("last", 2), ("all", 1)):
            kept = torch.tensor(counts[1:]) >= least
            sums[how] = [sums[how][0] + float(losses[kept].sum()), sums[how][1] + int(kept.sum())]
    found = {}
    for how, packing in (("last", "false"), ("all", "false"), ("all", "true")):
        name = f"{how}-{packing}"
        flags = (f"--data.train_on={how}", f"--data.packing={packing}", "--data.max_prompt_length=150")
        status, run = train(rows, "sft", name, *flags)
        assert status == 0
        found[name] = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8"))["loss"]
    expected = {how: total / count for how, (total, count) in sums.items()}
    assert abs(expected["all"] - expected["last"]) > 0.01
    assert found["last-false"] == pytest.approx(expected["last"], rel=1e-5)
    assert found["all-false"] == pytest.approx(expected["all"], rel=1e-5)
    assert found["all-true"] == pytest.approx(expected["all"], rel=1e-5)


def test_the_students_own_samples_are_the_last_turn(train, capsys):
    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user", "assistant")]
    status, run = train([{"messages": turns}] * 4, "gkd", "a", "--rollout.on_policy=1", "--data.train_on=all")
    assert status == 0, capsys.readouterr().err
    metrics = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8"))
    assert metrics["completions/mean_length"] <= 4


def test_separators_in_prompts_survive_the_teachers_answers(train, files, capsys):
    """They are written once, and read back by this run and the next."""
    rows = [{"prompt": f"a{separator}b", "completion": "c"} for separator in SEPARATORS]
    answers = f"--data.teacher_answers={files / 'answers.jsonl'}"
    for name in ("a", "b"):
        assert train(rows, "seqkd", name, answers)[0] == 0, capsys.readouterr().err
    kept = (files / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["prompt"] for line in kept] == [row["prompt"] for row in rows]


@pytest.mark.parametrize("method", ["minillm", "gkd"])
def test_the_largest_seed_runs(train, capsys, method):
    status, _ = train(
        [{"prompt": "a", "completion": "c"}] * 4, method, "a", f"--seed={MAX_SEED}", "--rollout.on_policy=1"
    )
    assert status == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"prompt": "", "completion": "b"}, ["--data.prompt_template={prompt}"], "record 5: the prompt is empty"),
        ({"messages": [{"role": "user", "content": None}]}, [], r"record 5, message 1 \(user\): `content` is missing"),
        ({"messages": [{"role": "tool", "content": "2"}]}, ["--data.prompt_template={prompt}"], "5 is a conversation"),
        ({"prompt": "a", "completion": "[assistant]b"}, [], r"record 5: the answer begins with '\[assistant\]'"),
        ({"prompt": "a", "completion": "b"}, ["--data.chat_template_kwargs.think=false"], "does not read 'think'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["sft", "minillm"])
def test_a_record_at_fault_stops_a_run_before_its_first_step(train, capsys, method, row, flags, message):
    status, run = train([{"prompt": "a", "completion": "b"}] * 4 + [row], method, "a", *flags)
    error = capsys.readouterr().err
    assert status == 2 and re.search(message, error) and not run.exists()
