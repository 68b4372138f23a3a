"""Teachers that are told more than the student, several teachers, and rewards of a task."""

import dataclasses
import json
import sys
import types

import pytest
import torch
from accelerate import Accelerator

from minillm.config.check import routes
from minillm.config.recipe import load_recipe, parse_flags, run_from, stage_from
from minillm.config.schema import ConfigError, Route, RunConfig, TeacherConfig
from minillm.data.examples import Example, Record
from minillm.data.sources import DataError
from minillm.distillation import load_pair, run_recipe
from minillm.model.cost import cost
from minillm.model.head import CausalLM
from minillm.teacher.own_base import own_teacher
from minillm.teacher.routed import Routed
from minillm.train import loop
from minillm.train.context import Context
from minillm.train.loop import METHODS
from minillm.train.minillm import policy_constants
from minillm.train.preflight import check_teachers, prepare

PROMPTS = [[5, 9, 17, 33], [7, 8], [100, 3, 45], [60]]
TOLD = [[1, 2, 3, 5, 9, 17, 33], None, [9], [60, 61, 62]]
ANSWERS = [[4, 8, 0], [15, 16, 23, 42, 0], [7, 0], [11, 12, 0]]


def context_of(make_llama, tokenizer, teacher=None, routed=None, source="checkpoint", told=TOLD, names=None, **stage):
    config = stage_from({"optim": {"batch_size": 4, "micro_batch_size": 2}, "validation": {"every": 0}, **stage})
    student = CausalLM(make_llama(2, seed=2).double())
    if teacher is None and routed is None:
        teacher = CausalLM(make_llama(3, seed=3).double()).requires_grad_(False)
        teacher = own_teacher(student, source) if source != "checkpoint" else teacher
    records = [Record([], None, teacher=name) for name in names or [""] * 4]
    rows = zip(records, PROMPTS, ANSWERS, told, strict=True)
    examples = [Example(record, prompt, answer, teacher_prompt=more) for record, prompt, answer, more in rows]
    run = dataclasses.replace(RunConfig(), teacher=TeacherConfig(source=source))
    return Context(run, config, Accelerator(), student, teacher, tokenizer, examples, [], [], routed=routed)


def step(context, method):
    """The loss of a step and its gradient, and what was learnt from."""
    parts = method.step(1).parts
    micros = [loop.Micro(part, part.batch(part.examples[i : i + 2])) for part in parts
              for i in range(0, len(part.examples), 2)]  # fmt: skip
    context.student.zero_grad()
    metrics = loop.backward(context, context.student, micros)
    gradient = [p.grad.clone() for p in context.student.parameters()]
    return metrics, gradient, [example for part in parts for example in part.examples]


def logits_of(model, prompt, response):
    return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


def reverse_kl(student, teacher):
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    return (q.exp() * (q - p)).sum()


def by_hand(context, teacher, learnt):
    """Reverse KL per token, each model behind its own prompt, by the models' own logits; and its gradient."""
    context.student.zero_grad()
    total, tokens = 0.0, 0
    for example in learnt:
        with torch.no_grad():
            p = logits_of(teacher, example.teacher_prompt or example.prompt, example.response)
        total = total + reverse_kl(logits_of(context.student.model, example.prompt, example.response), p)
        tokens += len(example.response)
    (total / tokens).backward()
    return float(total.detach() / tokens), [p.grad.clone() for p in context.student.parameters()]


LOSS = {"divergence": "reverse_kl", "distill_weight": 1.0, "label_weight": 0.0}


@pytest.mark.parametrize("method", ["kd", "gkd"])
@pytest.mark.parametrize("source", ["checkpoint", "student", "ema"])
@pytest.mark.parametrize("packing", [False, True])
def test_each_model_reads_its_own_prompt(tmp_path, make_llama, tokenizer, method, source, packing):
    context = context_of(
        make_llama, tokenizer, source=source, method=method, loss=LOSS,
        rollout={"on_policy": 1.0, "max_new_tokens": 5}, data={"packing": packing},
    )  # fmt: skip
    found, gradient, learnt = step(context, METHODS[method](context, tmp_path))
    assert {tuple(e.prompt) for e in learnt} == set(map(tuple, PROMPTS))
    expected, by_formula = by_hand(context, context.teacher.model, learnt)
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-5) and expected > 0.01
    for ours, theirs in zip(gradient, by_formula, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_a_rollout_of_minillm_is_scored_behind_the_teachers_prompts(tmp_path, make_llama, tokenizer):
    context = context_of(
        make_llama, tokenizer, method="minillm", objective={"pt_weight": 0.0},
        rollout={"alpha": 0.0, "batch_size": 4, "max_new_tokens": 5, "epochs": 1},
    )  # fmt: skip
    method = METHODS["minillm"](context, tmp_path)
    method.step(1)
    told = {tuple(prompt): more or prompt for prompt, more in zip(PROMPTS, TOLD, strict=True)}
    rollout = method.rollout
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses(), strict=True)):
        logprobs = logits_of(context.teacher.model, told[tuple(prompt)], response).log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(rollout.teacher_logprobs[i, : len(response)], expected, check_dtype=False)
        q = logits_of(context.student.model, prompt, response).log_softmax(-1)
        expected = q.gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(rollout.student_logprobs[i, : len(response)], expected, check_dtype=False)


def test_privileged_prompts_that_cannot_be(make_llama, tokenizer):
    context = context_of(make_llama, tokenizer, method="minillm")
    with pytest.raises(ConfigError, match=r"set rollout\.alpha to 0"):
        check_teachers(context.run, context.config, context.examples, None)
    context = context_of(make_llama, tokenizer, method="gkd", source="student")
    with pytest.raises(ConfigError, match="their divergence is 0"):
        check_teachers(context.run, context.config, context.examples, None)  # one of them is told nothing more


# ---- several teachers


def test_each_teacher_teaches_its_records_with_its_weight_and_divergence(tmp_path, make_llama, tokenizer):
    teachers = {name: CausalLM(make_llama(3, seed=seed).double()).requires_grad_(False)
                for name, seed in (("math", 3), ("code", 4))}  # fmt: skip
    routes = {"math": Route("a", 2.0, "forward_kl"), "code": Route("b", 0.5)}
    names = ["code", "math", "code", "math"]
    context = context_of(
        make_llama, tokenizer, routed=Routed(teachers, routes), names=names, told=[None] * 4, method="kd",
        loss={**LOSS, "distill_weight": 0.5, "label_weight": 0.25},
    )  # fmt: skip
    found, gradient, learnt = step(context, METHODS["kd"](context, tmp_path))
    assert sorted(e.record.teacher for e in learnt) == sorted(names)
    context.student.zero_grad()
    total, tokens = 0.0, 0
    for example in learnt:
        name = example.record.teacher
        s = logits_of(context.student.model, example.prompt, example.response)
        with torch.no_grad():
            t = logits_of(teachers[name].model, example.prompt, example.response)
        divergence = reverse_kl(t, s) if name == "math" else reverse_kl(s, t)  # forward KL is the reverse, turned
        label = torch.nn.functional.cross_entropy(s, torch.tensor(example.response), reduction="sum")
        total = total + 0.5 * routes[name].weight * divergence + 0.25 * label
        tokens += len(example.response)
    (total / tokens).backward()
    assert float(found["loss"]) == pytest.approx(float(total.detach() / tokens), rel=1e-5)
    for ours, p in zip(gradient, context.student.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-7, atol=1e-9)


def test_a_recipe_of_several_teachers_trains_and_refuses_others(files, make_llama, tokenizer):
    rows = [{"prompt": f"{i}?", "completion": str(i), "teacher": ("math", "code")[i % 2]} for i in range(8)]
    path = files / "routed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_llama(3, seed=5).save_pretrained(files / "other")
    tokenizer.save_pretrained(files / "other")
    teachers = {"math": {"model": str(files / "teacher")}, "code": {"model": str(files / "other"), "weight": 0.5}}
    tree = {"model": {"teacher": ""}, "teachers": teachers, "data": {"train": str(path)}}
    tree["stages"] = {"minillm": {"method": "gkd", "rollout": {"on_policy": 1.0}}}
    recipe = load_recipe(files / "recipe.yaml", [], overrides=tree)
    sizes = [sum(p.nbytes for p in make_llama(layers).parameters()) for layers in (4, 3)]
    assert cost(recipe.run, recipe.stages["minillm"]).held["teachers"] == sum(sizes)
    run = run_recipe(recipe)
    assert run.summary["stages"]["minillm"]["steps"] == 5 and "teacher" not in run.evaluations
    rows[3]["teacher"] = "physics"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="`teacher` is 'physics'; expected one of math, code"):
        prepare(recipe.run, recipe.stages["warm-up"], *load_pair(recipe.run))


def test_teachers_are_named_by_flags_as_well():
    flags = ["--teachers.math.model=x", "--teachers.math.weight=0.5", "--teachers.math.beta=0.25"]
    assert routes(run_from(parse_flags(flags))) == {"math": Route("x", 0.5, "", 0.25)}


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({"math": "x"}, "teachers.math is 'x'; expected {model: ORG/NAME}"),
        ({"math": {"model": "x", "wieght": 1}}, "did you mean 'weight'"),
        ({"math": {"model": "x", "weight": -1}}, "teachers.math.weight is -1; it lies in"),
        ({"math": {"model": "x", "divergence": "kl"}}, "teachers.math.divergence"),
        ({"math": {"model": "x"}}, "teachers are for kd and gkd; method minillm has one"),
    ],
)  # fmt: skip
def test_teachers_that_cannot_be(files, teachers, message):
    tree = {"model": {"teacher": ""}, "teachers": teachers}
    with pytest.raises(ConfigError, match=message):
        load_recipe(files / "recipe.yaml", [], overrides=tree)
    with pytest.raises(ConfigError, match="both name teachers"):
        load_recipe(files / "recipe.yaml", [], overrides={"teachers": {"math": {"model": "x"}}})


# ---- rewards of a task


@pytest.fixture
def task(monkeypatch):
    """A module `task` with a reward that can be verified: the right sum, in one digit."""
    module, calls = types.ModuleType("task"), []

    def right(prompts, responses, records):
        calls.append((prompts, responses, records))
        answers = [str(sum(map(int, record.messages[-1]["content"].split("+")))) for record in records]
        return [float(r[:1] == answer) for r, answer in zip(responses, answers, strict=True)]

    module.right, module.calls, module.none = right, calls, lambda **_: [1.0]
    module.nan, module.fails, module.text = lambda prompts, **_: [float("nan")] * len(prompts), lambda: None, "x"
    monkeypatch.setitem(sys.modules, "task", module)
    return module


def sums(files):
    rows = [{"prompt": f"{a}+{b}"} for a in range(3) for b in range(3)]
    (files / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data.train=" + str(files / "sums.jsonl"), "--objective.reward=task:right"]


def test_the_reward_of_a_verifiable_task_rises(files, task):
    """The student learns to answer by any digit, then by the reward alone which one is the sum."""
    rows = [{"prompt": f"{a}+{b}", "completion": str(c)} for a in range(2) for b in range(2) for c in range(10)]
    (files / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    optim = {"batch_size": 80, "micro_batch_size": 80, "lr": 1e-2}
    tree = {
        "data": {"train": str(files / "digits.jsonl")},
        "log": {"checkpoint_every": 0},
        "stages": {
            "warm-up": {"method": "sft", "optim": {**optim, "steps": 12}},
            "minillm": {
                "objective": {"reward": "task:right", "reward_coef": 20.0, "whiten": True, "pt_weight": 0.0,
                              "single_step": False},
                "rollout": {"alpha": 0.0, "batch_size": 80, "max_new_tokens": 1, "epochs": 1},
                "optim": {**optim, "steps": 12, "lr": 3e-3},
            },
        },
    }  # fmt: skip
    run = run_recipe(load_recipe(files / "recipe.yaml", [], overrides=tree), with_evaluation=False, doctor=False)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward/task"] for line in lines if line["stage"] == "minillm"]
    assert rewards[0] < 0.25 and sum(rewards[-3:]) / 3 > 0.4, rewards
    prompts, responses, records = task.calls[-1]
    assert len(prompts) == len(responses) == len(records) == 80 and prompts[0] == records[0].messages[0]["content"]


def test_the_reward_is_added_to_the_return_of_every_token(files, tmp_path, make_llama, tokenizer, task):
    def fixed(coef, **flags):
        context = context_of(
            make_llama, tokenizer, method="minillm", told=[None] * 4,
            objective={"pt_weight": 0.0, "reward": "task:right", "reward_coef": coef, **flags},
            rollout={"batch_size": 4, "max_new_tokens": 5, "epochs": 1},
        )  # fmt: skip
        records = [Record([{"role": "user", "content": f"1+{i}"}], None) for i in range(4)]
        context.examples = [e._replace(record=r) for e, r in zip(context.examples, records, strict=True)]
        method = METHODS["minillm"](context, tmp_path)
        method.reward = lambda prompts, responses, records: [float(len(p)) + int(p[-1]) for p in prompts]
        method.step(1)
        return method

    with_reward, without = fixed(0.5), fixed(0.0)
    order = [example.record.messages[0]["content"] for example in with_reward.sampled]
    for i, (one, other) in enumerate(zip(with_reward.sampled, without.sampled, strict=True)):
        given = 0.5 * (3 + int(order[i][-1]))
        torch.testing.assert_close(one.policy.advantages - other.policy.advantages,
                                   torch.full_like(other.policy.advantages, given))  # fmt: skip
        assert one.policy.old_logprobs.equal(other.policy.old_logprobs)
    resumed = fixed(0.5)
    calls = []
    resumed.reward = lambda **told: calls.append(told)
    resumed.remember(dict(with_reward.memory), 1)
    assert not calls  # the rewards of a rollout in use are kept with it
    for one, other in zip(with_reward.sampled, resumed.sampled, strict=True):
        assert one.policy.advantages.equal(other.policy.advantages)
    assert policy_constants(without.rollout, without.context.config.objective)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("task", "expected the import path of a function"),
        ("nowhere.at_all:f", "cannot be imported .ModuleNotFoundError"),
        ("task:missing", "cannot be imported .AttributeError"),
        ("task:text", "is str; expected a function"),
        ("task:none", "expected a finite number"),
        ("task:nan", "expected a finite number"),
        ("task:fails", "failed .TypeError"),
    ],
)
def test_rewards_that_cannot_be(files, task, name, message):
    flags = [*sums(files), f"--objective.reward={name}", "--log.checkpoint_every=0"]
    with pytest.raises(ConfigError, match=message):
        recipe = load_recipe(files / "recipe.yaml", flags)
        recipe.stages.pop("warm-up")
        run_recipe(recipe, with_evaluation=False, doctor=False)


def test_self_distillation_with_a_privileged_prompt_runs_from_a_recipe(files):
    """One set of weights, the teacher told the answer; examined first, evaluated after."""
    tree = {
        "model": {"teacher": ""},
        "teacher": {"source": "student"},
        "data": {"teacher_template": "{prompt} Answer: {answer}"},
        "stages": {
            "minillm": {"method": "gkd", "rollout": {"on_policy": 1.0}, "loss": {"divergence": "reverse_kl"}},
            "warm-up": {"method": "kd", "optim": {"steps": 1}},
        },
    }
    run = run_recipe(load_recipe(files / "recipe.yaml", ["--eval.prompts=2"], overrides=tree))
    losses = [json.loads(line)["loss/distill"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and all(loss > 1e-3 for loss in losses)  # else both would have read one prompt
