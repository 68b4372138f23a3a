"""Where each method gets its responses, and its loss on them."""

import json

import pytest
import torch

from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.data.examples import DataError, PolicyConstants
from minillm.model.head import CausalLM
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.run import checkpoint
from minillm.run.directory import RunDirectory
from minillm.train.baselines import Given
from minillm.train.context import Context, chunks
from minillm.train.loop import METHODS, blame, train
from minillm.train.minillm import policy_constants, whiten
from minillm.train.preflight import prepare
from minillm.train.selection import Selection

FLAGS = ["--optim.batch_size=4", "--optim.micro_batch_size=2", "--rollout.max_new_tokens=5"]


@pytest.fixture
def make(files, make_llama, make_tokenizer):
    """The context of one method on the tiny pair."""

    def build(method, *flags):
        recipe = load_recipe(files / "recipe.yaml", [*FLAGS, f"--method={method}", *flags])
        student, teacher = CausalLM(make_llama(2, seed=1)), CausalLM(make_llama(4))
        return prepare(recipe.run, recipe.stages["warm-up"], student, teacher, make_tokenizer())

    return build


def learnt(step):
    """Rows of (prompt and response ids) over the step's parts."""
    rows = []
    for part in step.parts:
        batch = part.batch(part.examples)
        rows += [ids[: int(n)].tolist() for ids, n in zip(batch.input_ids, batch.attention_mask.sum(1), strict=True)]
    return rows


def test_a_rollout_keeps_no_states_that_nobody_reads(make):
    context = make("minillm")
    rollout = context.roll_out(0, context.examples[:2], context.teacher, 0.2)
    assert rollout.student_hidden is None and rollout.teacher_hidden is not None


@pytest.mark.parametrize(("method", "lengths"), [("minillm", [2, 2, 2, 2, 4, 4]), ("gkd", [2, 2, 2, 4, 4, 4])])
def test_the_limit_of_a_rollout_changes_with_the_steps(make, tmp_path, method, lengths):
    """minillm samples before steps 1, 3 and 5; gkd before each."""
    context = make(method, "--rollout.max_new_tokens=[[0, 2], [3, 4]]", "--rollout.on_policy=1", "--rollout.epochs=1",
                   "--rollout.batch_size=8", "--data.max_response_length=2")  # fmt: skip
    steps = METHODS[method](context, tmp_path)
    found = [max(len(e.response) for e in steps.step(number).parts[0].examples) for number in range(1, 7)]
    assert found == lengths


def test_seqkd_learns_from_the_teachers_text_and_samples_it_once(make, tmp_path):
    context = make("seqkd")
    method = METHODS["seqkd"](context, tmp_path)
    examples = context.examples
    uniforms = draw_uniforms(context.run.seed, 5, len(examples))
    prompts = [example.prompt for example in examples]
    drawn = sample(context.teacher, None, prompts, Decoding(5, ends=[0]), alpha=0.0, uniforms=uniforms)
    expected = drawn.responses()
    texts = {tuple(prompt): prompt + response for prompt, response in zip(prompts, expected, strict=True)}
    assert learnt(method.step(1)) == [texts[tuple(example.prompt)] for example in method.drawn(1)]
    kept = [json.loads(line) for line in (tmp_path / "teacher-answers.jsonl").read_text().splitlines()]
    assert [row["token_ids"] for row in kept] == expected
    assert kept[0]["prompt"] == examples[0].record.prompt

    context.teacher.model.lm_head = None  # from here on, sampling again would fail
    assert learnt(METHODS["seqkd"](context, tmp_path).step(1)) == learnt(method.step(1))


def test_answers_that_exist_are_kept_when_sampling_breaks_off(make, tmp_path, monkeypatch):
    context = make("seqkd", "--rollout.batch_size=4")
    whole = METHODS["seqkd"](context, tmp_path / "whole").examples
    (tmp_path / "again").mkdir()
    lines = (tmp_path / "whole" / "teacher-answers.jsonl").read_text().splitlines(keepends=True)
    unfinished = tmp_path / "again" / "teacher-answers.jsonl.unfinished"
    unfinished.write_text("".join(lines[:6]) + lines[6][:20])  # the last one was cut as it was written
    asked, sample_responses = [], Context.sample_responses

    def counted(self, student, teacher, prompts, *rest, **named):
        asked.extend(prompts)
        return sample_responses(self, student, teacher, prompts, *rest, **named)

    monkeypatch.setattr(Context, "sample_responses", counted)
    again = METHODS["seqkd"](context, tmp_path / "again").examples
    assert [e.response for e in again] == [e.response for e in whole] and len(asked) == len(whole) - 6
    assert not unfinished.exists()
    unfinished.write_text("".join(reversed(lines)))  # of other prompts
    (tmp_path / "again" / "teacher-answers.jsonl").unlink()
    assert [e.response for e in METHODS["seqkd"](context, tmp_path / "again").examples] == [e.response for e in whole]


def test_several_runs_share_the_teachers_answers(make, tmp_path):
    flag = f"--data.teacher_answers={tmp_path / 'kept' / 'answers.jsonl'}"
    first = METHODS["seqkd"](make("seqkd", flag), tmp_path / "a")
    context = make("seqkd", flag)
    context.teacher.model.lm_head = None  # sampling again would fail
    second = METHODS["seqkd"](context, tmp_path / "b")
    assert learnt(second.step(1)) == learnt(first.step(1)) and not (tmp_path / "b").exists()
    context.examples.reverse()
    with pytest.raises(DataError, match=r"answers other prompts.*data.teacher_answers"):
        METHODS["seqkd"](context, tmp_path / "c")


def test_gkd_takes_its_own_samples_for_a_share_of_the_steps(make, tmp_path):
    context = make("gkd", "--rollout.on_policy=0.3")
    method = METHODS["gkd"](context, tmp_path)
    own = 0
    for number in range(1, 121):
        rows, data = learnt(method.step(number)), method.given.drawn(number)
        if rows == [example.prompt + example.response for example in data]:
            continue
        own += 1
        for row, example in zip(rows, data, strict=True):
            assert row[: len(example.prompt)] == example.prompt
            assert 1 <= len(row) - len(example.prompt) <= 5
    # 120 coins of 0.3: 36 ± 5; four standard deviations on both sides
    assert 16 <= own <= 56
    assert learnt(method.step(7)) == learnt(METHODS["gkd"](context, tmp_path).step(7))  # a function of the number


def test_the_share_of_own_samples_grows_when_the_validation_loss_rises(make, files, monkeypatch):
    """DistiLLM's schedule; what it has become is in the checkpoint."""
    flags = ["--rollout.on_policy=0.0", "--rollout.on_policy_step=0.4", "--validation.every=1", "--optim.steps=6"]
    context = make("gkd", *flags)
    losses, shares = iter([7.0, 1.0, 1.05, 1.2, 1.0, 1.2, 9.0]), []  # the first is not heard

    def loss(self, method):
        shares.append(float(method.memory["on_policy"]))
        return next(losses)

    monkeypatch.setattr(Selection, "_loss", loss)
    run = RunDirectory(load_recipe(files / "recipe.yaml"))
    train(context, run, "x")
    assert shares == pytest.approx([0.0, 0.0, 0.0, 0.0, 0.4, 0.4, 0.8])  # rises: 0.05, 0.15, none, 0.2, 7.8
    method = METHODS["gkd"](context, files)
    method.validated(1.0)
    method.validated(3.0)
    method.validated(5.0)
    method.validated(7.0)
    assert method.memory["on_policy"] == 1.0
    again = METHODS["gkd"](context, files)
    again.remember(method.memory, 3)
    assert again.memory["validation_loss"] == 7.0
    with pytest.raises(ConfigError, match=r"on_policy_step follows the validation loss: set validation.every"):
        make("gkd", "--rollout.on_policy_step=0.1")


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize(("divergence", "temperature"), [("reverse_kl", 1), ("forward_kl", 1), ("forward_kl", 2)])
def test_kd_is_divergence_and_labels_in_one_sweep_or_two(make, tmp_path, divergence, temperature, head):
    """At temperature 1 both terms come from one pass over the logits, else from two: one formula, and gradient."""
    flags = [f"--loss.divergence={divergence}", f"--loss.temperature={temperature}", "--loss.distill_weight=0.7"]
    context = make("kd", *flags)
    context.student.fused = context.teacher.fused = head == "fused"
    (part,) = METHODS["kd"](context, tmp_path).step(1).parts
    batch = part.batch(part.examples)
    found = part.loss(context.student.output(batch), batch)

    with torch.no_grad():
        teacher = context.teacher.model(batch.input_ids, attention_mask=batch.attention_mask).logits[batch.predict]
    student = context.student.model(batch.input_ids, attention_mask=batch.attention_mask).logits[batch.predict]
    log_q, log_p = ((z.double() / temperature).log_softmax(-1) for z in (student, teacher))
    a, b = (log_q, log_p) if divergence == "reverse_kl" else (log_p, log_q)
    distill = (a.exp() * (a - b)).sum()
    label = torch.nn.functional.cross_entropy(student.double(), batch.targets, reduction="sum")
    expected = 0.7 * distill + context.config.loss.label_weight * label
    for name, value in {"loss": expected, "loss/distill": distill, "loss/label": label}.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-5)
    parameters = list(context.student.parameters())
    ours, theirs = (torch.autograd.grad(x, parameters) for x in (found["loss"], expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "divergence", ["reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]
)
def test_gkd_on_policy_is_the_divergence_alone(make, tmp_path, divergence):
    """No labels on the student's own samples, and no gradient through sampling: the loss of these tokens as given."""
    context = make("gkd", "--rollout.on_policy=1", f"--loss.divergence={divergence}", "--loss.beta=0.1")
    (part,) = METHODS["gkd"](context, tmp_path).step(1).parts
    batch = part.batch(part.examples)
    found = part.loss(context.student.output(batch), batch)
    assert found.keys() == {"loss", "loss/distill"}

    student = context.student.model(batch.input_ids, attention_mask=batch.attention_mask).logits[batch.predict]
    teacher = context.teacher.model(batch.input_ids, attention_mask=batch.attention_mask).logits[batch.predict]
    q, p = student.softmax(-1), teacher.softmax(-1)

    def kl(a, b):
        return (a * (a.log() - b.log())).sum()

    expected = {
        "reverse_kl": lambda: kl(q, p),
        "forward_kl": lambda: kl(p, q),
        "jsd": lambda: 0.1 * kl(p, 0.1 * p + 0.9 * q) + 0.9 * kl(q, 0.1 * p + 0.9 * q),
        "skew_forward_kl": lambda: kl(p, 0.1 * p + 0.9 * q),
        "skew_reverse_kl": lambda: kl(q, 0.9 * p + 0.1 * q),
        "tvd": lambda: 0.5 * (p - q).abs().sum(),
    }[divergence]()
    weight = context.config.loss.distill_weight
    torch.testing.assert_close(found["loss"], weight * expected, rtol=1e-4, atol=1e-4)
    parameters = list(context.student.parameters())
    ours = torch.autograd.grad(found["loss"], parameters)
    theirs = torch.autograd.grad(weight * expected, parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_what_a_rollout_fixes_rides_with_its_tokens(make, tmp_path, size, packing, variant):
    """Constants and teacher states in the batches of two steps against the rollout, row by row, and against forward
    passes of both models over the batches."""
    flags = [f"--objective.variant={variant}", f"--data.packing={packing}", "--rollout.batch_size=8"]
    context = make("minillm", *flags)
    method = METHODS["minillm"](context, tmp_path)
    for number in (1, 2):
        part = method.step(number).parts[0]
        batches = [part.batch(examples) for examples in chunks(part.examples, size)]
        assert (len(batches[0].input_ids) < size) == (packing and size > 1)
        rollout, objective = method.rollout, context.config.objective
        rows = [rollout.prompts.index(example.prompt) for example in part.examples]
        constants = [policy_constants(rollout, objective)[row] for row in rows]
        expected = PolicyConstants.concatenate(whiten(constants) if objective.whiten else constants)
        found = PolicyConstants.concatenate([batch.policy for batch in batches])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        assert torch.cat([batch.targets for batch in batches]).tolist() == [
            token for row in rows for token in rollout.responses()[row]
        ]
        for batch in batches:
            assert torch.equal(batch.input_ids.roll(-1, dims=1)[batch.predict], batch.targets)
            with torch.no_grad():
                states = context.teacher.output(batch).states
                logits = context.student.logits(context.student.output(batch).states)
            torch.testing.assert_close(batch.teacher_states, states, rtol=1e-4, atol=1e-4)
            old = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
            torch.testing.assert_close(batch.policy.old_logprobs, old, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["sft", "kd", "seqkd", "gkd", "minillm"])
@pytest.mark.parametrize("packing", [False, True])
def test_every_method_trains_packed_or_not_the_same(make, files, method, packing):
    def losses(packing):
        context = make(method, "--optim.steps=3", f"--data.packing={packing}", "--rollout.batch_size=4")
        run = RunDirectory(load_recipe(files / "recipe.yaml", [f"--output={files / str(packing)}"]))
        train(context, run, "x")
        return [json.loads(line)["loss"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]

    if packing:
        assert losses(True) == pytest.approx(losses(False), rel=1e-4)
    else:
        assert len(losses(False)) == 3


def test_the_sample_at_fault_is_named(make, files):
    """Token 200 is in one answer alone; its embedding is made infinite."""
    rows = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    rows[5]["output"] = "ÿ"
    (files / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = make("sft", "--optim.batch_size=14", "--optim.micro_batch_size=7")
    token = context.examples[5].response[0]
    assert sum(token in example.response for example in context.examples) == 1
    with torch.no_grad():
        context.student.model.model.embed_tokens.weight[token] = float("inf")
    run = RunDirectory(load_recipe(files / "recipe.yaml"))
    message = r"x, step 1: loss nan.*the first sample at fault is .*train.jsonl, record 6 \(responses\).*not updated"
    with pytest.raises(FloatingPointError, match=message):
        train(context, run, "x")
    assert not (run.path / "checkpoints").exists()


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(make, files):
    """Two good steps, then weights that give nothing finite."""
    context = make("sft", "--optim.steps=9", "--log.checkpoint_every=1")
    run, steps = RunDirectory(load_recipe(files / "recipe.yaml")), []
    method_step = Given.step

    def poisoned(self, number):
        if number == 3:
            with torch.no_grad():
                self.context.student.model.lm_head.weight.fill_(float("inf"))
        steps.append(number)
        return method_step(self, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError) as error:
        patch.setattr(Given, "step", poisoned)
        train(context, run, "x")
    assert steps == [1, 2, 3]
    kept = run.path / "checkpoints" / "step-2"
    assert "x, step 3: loss nan" in str(error.value) and f"--resume {kept}" in str(error.value)
    assert all(torch.isfinite(w).all() for w in checkpoint.load(kept, run.recipe).groups["model"].values())


def test_a_step_that_overflows_only_in_sum_blames_nobody(make):
    context = make("sft")
    assert blame(context, METHODS["sft"](context, None).step(1).parts) == "no sample alone gives that: lower optim.lr"


def test_empty_answers_are_an_error_or_left_out(make, files):
    with (files / "train.jsonl").open("a") as file:
        file.write('{"prompt": "silence", "completion": " "}\n{"prompt": "nothing"}\n')
    message = r"2 of 16 records have no answer or an empty one, the first .*train.jsonl, record 15.*empty_answers"
    for method in ("sft", "kd", "gkd"):
        with pytest.raises(DataError, match=message):
            make(method)
        assert len(make(method, "--data.empty_answers=drop").examples) == 14
    assert len(make("minillm", "--rollout.batch_size=8").examples) == 16  # learns from what it samples
    assert "2 empty answers left out" in make("sft", "--data.empty_answers=drop").about
