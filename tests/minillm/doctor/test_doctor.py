"""Every check of the doctor, on a healthy stage and on one that is broken on purpose."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.distillation import load_pair
from minillm.doctor import CHECKS, examine, refuse
from minillm.doctor.patient import Patient
from minillm.model.load import load_model
from minillm.train.context import Context
from minillm.train.preflight import prepare


def context_of(files, stage="minillm", *flags):
    recipe = load_recipe(files / "recipe.yaml", flags)
    return prepare(recipe.run, recipe.stages[stage], *load_pair(recipe.run))


@pytest.fixture
def context(files):
    return context_of(files)


def finding(context, name):
    return examine(context, [name])[name]


def zero_head(model):
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()


def flatten_decoding(lm):
    """A cache that loses the model's confidence: another law than the forward pass, one token at a time only."""
    lm.model.base_model.register_forward_hook(
        lambda _, __, output: (
            setattr(output, "last_hidden_state", output.last_hidden_state * 0.2)
            if output.last_hidden_state.shape[1] == 1
            else None
        )
    )


def learn(lm, batch):
    """Answers by heart."""
    model = lm.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        logits = model(**batch.inputs()).logits[batch.predict]
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().requires_grad_(False)


@pytest.mark.parametrize("method", ["sft", "kd", "seqkd", "gkd", "minillm"])
def test_a_healthy_stage_has_nothing_wrong_and_is_not_changed(files, method):
    flags = [
        f"--stages.warm-up.method={method}",
        "--stages.warm-up.loss.divergence=jsd",
        "--stages.warm-up.loss.temperature=2",
    ]
    context = context_of(files, *(["minillm"] if method == "minillm" else ["warm-up", *flags]))
    before = [p.clone() for p in context.student.parameters()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = examine(context)
    assert found.keys() == CHECKS.keys()
    assert not {name: f for name, f in found.items() if f.status == "wrong"}
    assert all(torch.equal(a, b) for a, b in zip(before, context.student.parameters(), strict=True))
    assert all(p.grad is None for p in context.student.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stage", ["warm-up", "minillm"])
def test_a_temperature_or_scale_applied_twice(files, stage):
    context = context_of(files, stage)
    assert finding(context, "formula of the loss").status == "ok"
    context.teacher.model.config.logit_scale = 0.5  # our reading of the head has it, the model's own forward has not
    assert finding(context, "formula of the loss").status == "wrong"


def test_a_teacher_without_weights(context):
    assert finding(context, "teacher knows something").status == "ok"
    zero_head(context.teacher.model)
    assert finding(context, "teacher knows something").status == "wrong"


def test_a_teacher_with_one_law_for_every_token(context):
    constant = torch.randn(32)
    context.teacher.model.model.norm.register_forward_hook(lambda _, __, output: constant.expand_as(output))
    assert finding(context, "teacher knows something").status == "wrong"


def test_targets_that_are_shifted_by_one(context):
    patient = Patient.of(context)
    learn(context.teacher, patient.answers)
    assert CHECKS["targets aligned"](patient).status == "ok"
    for shift in (1, -1):
        batch = patient.answers
        shifted = Patient.of(context)
        shifted.__dict__["answers"] = batch._replace(targets=batch.targets.roll(shift))
        assert CHECKS["targets aligned"](shifted).status == "wrong"


def test_a_teacher_that_ends_elsewhere(context, monkeypatch):
    patient = Patient.of(context)
    learn(context.teacher, patient.answers)
    assert CHECKS["end of a response"](patient).status == "ok"
    never = [example._replace(response=[*example.response[:-1], 200]) for example in context.examples]
    monkeypatch.setattr(Context, "ends", (200,))
    assert CHECKS["end of a response"](Patient.of(replace(context, examples=never))).status == "warning"


def test_columns_without_a_token(files, make_llama, make_tokenizer):
    assert finding(context_of(files), "padded columns").status == "ok"
    for name in ("teacher", "student"):
        make_llama(2, vocab_size=300).save_pretrained(
            files / name
        )  # random: it puts a seventh on what stands for nothing
    assert finding(context_of(files), "padded columns").status == "warning"
    context = replace(context_of(files), tokenizer=make_tokenizer())
    context.tokenizer.add_tokens([f"<{i}>" for i in range(50)])
    assert "the heads share 300 columns" in finding(context, "padded columns").found


@pytest.mark.parametrize("stage", ["warm-up", "minillm"])
def test_a_teacher_that_does_not_agree_with_itself(files, stage):
    context = context_of(files, stage)
    assert finding(context, "teacher into itself").status == "ok"
    for layer in context.teacher.model.model.layers:
        layer.register_forward_hook(lambda _, __, output: output + 0.3 * torch.randn_like(output))  # dropout left on
    assert finding(context, "teacher into itself").status == "wrong"


@pytest.mark.parametrize("stage", ["warm-up", "minillm"])
def test_a_gradient_that_is_not_that_of_the_loss(files, stage):
    context = context_of(files, stage)
    assert finding(context, "gradient").status == "ok"
    context.student.model.lm_head.weight.register_hook(lambda gradient: 2 * gradient)
    assert finding(context, "gradient").status == "wrong"


def test_a_sampler_of_another_law(context):
    assert finding(context, "own samples").status == "ok"
    flatten_decoding(context.teacher)
    assert finding(context, "own samples").status == "wrong"


def test_a_rollout_that_is_not_the_forward_pass(context):
    assert finding(context, "rollout and update").status == "ok"
    flatten_decoding(context.student)
    assert finding(context, "rollout and update").status == "wrong"


def test_templates_and_tokens_that_differ(files, make_tokenizer):
    context = context_of(files)
    assert finding(context, "templates").status == finding(context, "tokens read alike").status == "ok"
    theirs = make_tokenizer()
    theirs.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    theirs.save_pretrained(files / "teacher")
    assert finding(context, "templates").status == "warning"
    make_tokenizer(reverse=True).save_pretrained(files / "teacher")
    assert finding(context, "tokens read alike").status == "wrong"
    theirs.chat_template = None
    theirs.save_pretrained(files / "teacher")
    (files / "teacher" / "chat_template.jinja").unlink(missing_ok=True)
    assert finding(context, "templates").status == "warning"


def test_a_teacher_that_has_no_opinion_of_student_text(context):
    zero_head(context.teacher.model)
    assert finding(context, "teacher on student text").status == "warning"


def test_a_device_that_is_too_small(context, monkeypatch):
    assert finding(context, "memory").status == "ok"
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**10))
    assert finding(context, "memory").status == "wrong"


# ---- the command, and the start of a run


def test_the_command_tells_each_stage_and_its_status(files, capsys):
    assert main(["doctor", str(files / "recipe.yaml")]) == 0
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert all(sum(f" {name} " in line[:36] for line in lines) == 2 for name in CHECKS)
    assert "warm-up (kd)" in lines and "minillm (minillm)" in lines
    assert not (files / "run").exists()


def test_a_run_begins_with_the_quick_checks(files, capsys):
    teacher = load_model(str(files / "teacher"), "float32", "auto")
    zero_head(teacher)
    teacher.save_pretrained(files / "teacher")
    recipe = str(files / "recipe.yaml")
    assert main(["doctor", recipe]) == 2
    assert "its weights are missing or zero" in capsys.readouterr().out
    assert main(["distill", recipe]) == 2
    assert "warm-up: teacher knows something: " in capsys.readouterr().err
    assert not (files / "run").exists()
    assert main(["train", recipe, "--no-doctor", "--stages.minillm.optim.steps=1"]) == 0


def test_a_warning_does_not_stop_a_run(context):
    refuse("minillm", context)


@pytest.mark.parametrize("source", ["checkpoint", "base", "student", "ema"])
def test_a_teacher_that_is_told_more_or_is_the_student_is_no_fault(files, source):
    tree = {
        "model": {"teacher": str(files / "teacher") if source == "checkpoint" else ""},
        "teacher": {"source": source},
        "lora": {"rank": 2 if source == "base" else 0},
        "data": {"teacher_template": "" if source == "base" else "{prompt} {answer}"},
        "stages": {"warm-up": {"method": "kd"}, "minillm": {"method": "gkd", "rollout": {"on_policy": 1.0}}},
    }
    if source == "base":
        pytest.importorskip("peft")
    recipe = load_recipe(files / "recipe.yaml", [], overrides=tree)
    context = prepare(recipe.run, recipe.stages["minillm"], *load_pair(recipe.run))
    found = examine(context, ["formula of the loss", "targets aligned", "teacher into itself", "gradient"])
    assert [name for name, finding in found.items() if finding.status == "wrong"] == []
    assert found["gradient"].status == ("skipped" if source in ("base", "student") else "ok")
