import pytest
import torch

from minillm.config.recipe import load_recipe
from minillm.config.schema import DataConfig, EvalConfig
from minillm.data.examples import encode, read_records
from minillm.evaluation.divergence import draw, references
from minillm.model.decoder import takes_rows
from minillm.model.head import CausalLM
from minillm.model.masks import takes_masks


@pytest.fixture
def world(files, make_llama, tokenizer):
    config = load_recipe(files / "recipe.yaml").run
    examples = encode(read_records(config.data.eval), tokenizer, config.data, DataConfig(), "eval").examples
    return config, CausalLM(make_llama(2, seed=1)), CausalLM(make_llama(4)), tokenizer, examples


def along_own_samples(student, teacher, examples, settings):
    """The reverse KL."""
    drawn = draw(student, teacher, examples, settings, [0])
    return drawn.per_token(drawn.to_other)


@torch.no_grad()
def test_divergences_on_references_against_plain_torch(world):
    _, student, teacher, _, examples = world
    reverse, forward = references(student, teacher, examples, EvalConfig(batch_size=8))
    for i, example in enumerate(examples):
        ids = torch.tensor([example.prompt + example.response])
        log_q, log_p = (
            m.model(ids).logits[0, len(example.prompt) - 1 : -1].double().log_softmax(-1) for m in (student, teacher)
        )
        assert reverse.totals[i].item() == pytest.approx((log_q.exp() * (log_q - log_p)).sum().item(), rel=1e-4)
        assert forward.totals[i].item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-4)
        assert reverse.counts[i] == forward.counts[i] == len(example.response)


def test_own_samples_do_not_depend_on_the_batch(world):
    _, student, teacher, _, examples = world
    one, all_at_once = (
        along_own_samples(student, teacher, examples, EvalConfig(samples=2, sample_tokens=5, batch_size=size))
        for size in (2, 64)
    )
    torch.testing.assert_close(one.totals, all_at_once.totals, rtol=1e-4, atol=1e-4)
    assert one.counts.tolist() == all_at_once.counts.tolist()


def test_a_student_that_is_the_teacher_has_no_divergence(world):
    _, _, teacher, _, examples = world
    assert along_own_samples(teacher, teacher, examples, EvalConfig(sample_tokens=4)).mean == pytest.approx(
        0, abs=1e-5
    )


@torch.no_grad()
def test_divergences_of_samples_against_plain_torch(world):
    _, student, teacher, _, examples = world
    drawn = draw(teacher, student, examples[:2], EvalConfig(samples=2, sample_tokens=5, batch_size=2), [0])
    for row, tokens in enumerate(drawn.token_ids):
        prompt = examples[row // 2].prompt
        log_p, log_q = (
            m.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for m in (teacher, student)
        )
        forward, reverse = (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
        torch.testing.assert_close(drawn.to_other[row, : len(tokens)], forward, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(drawn.from_other[row, : len(tokens)], reverse, rtol=1e-4, atol=1e-5)
        assert drawn.to_other[row, len(tokens) :].sum() == 0


def test_a_seed_draws_the_same_however_many_there_are(world):
    _, student, _, _, examples = world
    few, many = (draw(student, None, examples, EvalConfig(samples=s, sample_tokens=5), [0]).token_ids for s in (1, 3))
    assert few == many[::3] and many[::3] != many[1::3]


def test_samples_that_nothing_compares_make_place_for_others(world):
    """The same tokens as all at once, in fewer passes than places used in turns take."""
    _, student, _, _, examples = world
    assert takes_rows(student) and takes_masks(student)  # tried once, which is not counted
    passes = []
    student.model.base_model.register_forward_hook(lambda _, __, output: passes.append(output[0].shape[1]))
    few, all_at_once = (
        draw(student, None, examples * 4, EvalConfig(samples=1, sample_tokens=24, batch_size=size), range(0, 257, 12))
        for size in (4, 64)
    )
    assert few.token_ids == all_at_once.token_ids
    lengths = few.lengths.tolist()
    in_turns = sum(max(lengths[start : start + 4]) for start in range(0, len(lengths), 4))
    assert passes.count(1) - max(lengths) < 0.9 * in_turns
