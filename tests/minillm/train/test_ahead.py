"""Rollouts sampled ahead: by which student, with which law, and as a run without them where there is none."""

import threading

import pytest
import torch

from minillm.config.recipe import load_recipe
from minillm.model.head import CausalLM
from minillm.run.directory import RunDirectory
from minillm.train.ahead import Ahead, _frozen
from minillm.train.loop import METHODS, train
from minillm.train.minillm import importance_weights, token_rewards
from minillm.train.preflight import prepare

FLAGS = ["--method=minillm", "--optim.batch_size=4", "--rollout.batch_size=8", "--rollout.epochs=1", "--optim.steps=6",
         "--objective.pt_weight=0", "--rollout.max_new_tokens=6", "--optim.lr=1e-2",
         "--validation.every=0"]  # fmt: skip


@pytest.fixture
def make(files, make_llama, make_tokenizer):
    def build(*flags):
        recipe = load_recipe(files / "recipe.yaml", [*FLAGS, f"--output={files / 'ahead'}", *flags])
        student, teacher = CausalLM(make_llama(2, seed=1)), CausalLM(make_llama(4))
        return recipe, prepare(recipe.run, recipe.stages["warm-up"], student, teacher, make_tokenizer())

    return build


def changed(lm):
    """As an update would: in place."""
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


WAYS = {
    "alone": ["--rollout.alpha=0"],
    "side by side": [],
    "coins first, in places": ["--rollout.coins=2", "--rollout.chunk_size=3"],
    "16 bits": ["--model.compute_dtype=bfloat16"],
    "16 bits, coins first": ["--model.compute_dtype=bfloat16", "--rollout.coins=1"],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_student_as_it_was_samples_and_as_it_is_is_learnt(make, tmp_path, way):
    """Two steps a rollout: the second rollout is of the student before step 1, used by the student after step 2. In 16
    bits the copy's weights are rounded, and the law that samples is that of the copy."""
    _, context = make("--rollout.overlap=1", *WAYS[way])
    near = {"rtol": 2e-2, "atol": 5e-2} if "16 bits" in way else {"rtol": 1e-4, "atol": 1e-4}
    method = METHODS["minillm"](context, tmp_path)
    method.step(1)
    _, same = make(*WAYS[way])
    sampler = METHODS["minillm"](same, tmp_path)
    expected = sampler.draw(1, sampler.prompted(1), _frozen(same.student, same.compute_dtype))
    assert (expected.decoded_logprobs is not None) == ("16 bits" in way)  # read again by whole passes
    changed(context.student)  # while, before or after the other thread samples
    method.step(2)
    step = method.step(3)
    found = method.rollout
    assert found.responses() == expected.responses()
    torch.testing.assert_close(found.older_logprobs, expected.student_logprobs)
    torch.testing.assert_close(found.mixture_logprobs, expected.mixture_logprobs)
    batch = step.parts[0].batch([e._replace(policy=None) for e in method.sampled])
    with torch.no_grad(), context.autocast():
        states, head = context.student.output(batch)
        now = head.logits(states).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    now = now.float()
    torch.testing.assert_close(found.student_logprobs[found.mask], now, **near)
    assert (now - expected.student_logprobs[found.mask]).abs().max() > 0.01
    torch.testing.assert_close(
        importance_weights(found)[found.mask],
        (found.student_logprobs - expected.mixture_logprobs)[found.mask].exp(),
        rtol=1e-3,
        atol=1e-3,
    )
    rewards = (expected.teacher_logprobs - found.student_logprobs)[found.mask]
    torch.testing.assert_close(token_rewards(found)[found.mask], rewards, rtol=1e-3, atol=1e-3)
    staleness = (found.student_logprobs - expected.student_logprobs)[found.mask].abs().mean()
    torch.testing.assert_close(step.metrics["rollout/staleness"], staleness, rtol=1e-3, atol=1e-4)


def test_a_student_that_does_not_change_learns_the_same(make, tmp_path):
    """One batch ahead or none: the same rollouts, weights and returns, where the older student is the student."""
    found = []
    for flags in ([], ["--rollout.overlap=1"]):
        _, context = make(*flags)
        method = METHODS["minillm"](context, tmp_path)
        found.append([method.step(number).parts[0].batch(method.sampled).to("cpu") for number in range(1, 7)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        for a, b in zip(one.policy, other.policy, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_it_samples_while_the_student_learns(make, tmp_path, monkeypatch):
    """Nothing waits for the other thread before the rollouts are used, and none begins that no step would use."""
    _, context = make("--rollout.overlap=1", "--optim.steps=4")
    go, threads = threading.Event(), []
    draw = type(context).draw

    def slow(self, *args):
        threads.append(threading.current_thread().name)
        if len(threads) > 1:
            assert go.wait(60)
        return draw(self, *args)

    monkeypatch.setattr(type(context), "draw", slow)
    method = METHODS["minillm"](context, tmp_path)
    method.step(1), method.step(2)
    go.set()
    method.step(3), method.step(4)
    assert threads[0] == "MainThread" and threads[1].startswith("rollout") and len(threads) == 2


def test_an_error_of_the_other_thread_ends_the_run(make, tmp_path):
    _, context = make("--rollout.overlap=1")
    method = METHODS["minillm"](context, tmp_path)
    method.step(1)
    method.wait()
    method.next = None
    with torch.no_grad():
        context.student.model.model.norm.weight.fill_(float("nan"))
    method.ahead.start(lambda older: method.draw(1, method.prompted(1), older))
    with pytest.raises(FloatingPointError, match="are not finite in response"):
        method.step(3)


def test_the_copy_shares_what_is_not_trained(make_llama):
    lm = CausalLM(make_llama(2))
    lm.model.model.embed_tokens.requires_grad_(False)
    ahead = Ahead(lm, torch.bfloat16)
    ahead.start(lambda older: older)
    older = ahead.take()
    assert older.model.model.embed_tokens.weight is lm.model.model.embed_tokens.weight
    trained = older.model.lm_head.weight
    assert trained.dtype == torch.bfloat16 and not trained.requires_grad and lm.model.lm_head.weight.requires_grad
    changed(lm)
    assert not torch.equal(trained, lm.model.lm_head.weight.bfloat16())
    ahead.start(lambda older: older)
    assert ahead.take() is older and torch.equal(trained, lm.model.lm_head.weight.bfloat16())
    assert ahead.take() is None


def test_the_staleness_is_logged(make):
    recipe, context = make("--rollout.overlap=1")
    directory = RunDirectory(recipe)
    train(context, directory, "warm-up")
    text = (directory.path / "metrics.jsonl").read_text().splitlines()
    assert ["rollout/staleness" in line for line in text] == [False, False, True, True, True, True]
