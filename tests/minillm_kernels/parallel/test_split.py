"""A vocabulary split over 2, 3 and 4 processes gives what one process gives (split_cases.py and split_calls.py)."""

import pytest
import split_calls
import split_cases
import torch
from worlds import World

from minillm_kernels import available_backends

F32, F64 = torch.float32, torch.float64


@pytest.fixture(scope="module", params=[2, 3, 4])
def world(request):
    with World(request.param, "split_calls") as world:
        yield world


DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
OF_LOGITS = {
    "rkl": ("fused_rkl_loss", {"temperature": 1.3}),
    **{f"{name} sum": ("fused_divergence_loss", {"divergence": name, "beta": 0.3, "reduction": "sum"})
       for name in DIVERGENCES},
    **{f"{name} rows": ("fused_divergence_loss", {"divergence": name, "reduction": "none"}) for name in DIVERGENCES},
    "mean": ("fused_divergence_loss", {"divergence": "tvd", "reduction": "mean", "temperature": 0.7}),
    "normalizer": ("fused_rkl_loss", {"normalizer": 3.0}),
    "tokens": ("token_logprobs", {"temperature": 0.7}),
    "stats": ("distill_stats", {"temperature": 1.3}),
    "distill": ("distill_loss", {"reverse_kl": 0.3, "forward_kl": 0.2, "student_logprobs": -0.5,
                                 "student_entropy": 0.1, "student_logsumexp": 0.2}),
    "minillm": ("minillm_loss", {"entropy_coef": 0.1, "temperature": 1.3}),
}  # fmt: skip
OF_HIDDEN = {
    "rkl": ("fused_linear_rkl_loss", {"temperature": 1.3}),
    "jsd": ("fused_linear_divergence_loss", {"divergence": "jsd", "beta": 0.3, "reduction": "mean"}),
    "tvd rows": ("fused_linear_divergence_loss", {"divergence": "tvd", "reduction": "none"}),
    "forward kl rows": ("fused_linear_divergence_loss", {"divergence": "forward_kl", "reduction": "none"}),
    "tokens": ("fused_linear_token_logprobs", {"temperature": 0.7, "gather": True}),
    "stats": ("fused_linear_distill_stats", {"chunk_rows": 8}),
    "distill": ("fused_linear_distill_loss", {"reverse_kl": 0.3, "student_logprobs": -0.5, "chunk_rows": 8}),
    "minillm": ("fused_linear_minillm_loss", {"entropy_coef": 0.1, "temperature": 1.3, "chunk_rows": 8}),
}


@pytest.mark.parametrize("V", [515, 5, 2])
def test_functions_of_logits(world, V):
    for name, options in OF_LOGITS.values():
        world.run(split_cases.of_logits, name, V, options)


def test_logits_far_from_zero(world):
    for name in ("stats", "distill", "minillm", "rkl"):
        world.run(split_cases.of_logits, OF_LOGITS[name][0], 515, OF_LOGITS[name][1], 1000.0)


@pytest.mark.parametrize("V", [515, 5, 2])
def test_functions_of_hidden_states(world, V):
    for i, (name, options) in enumerate(OF_HIDDEN.values()):
        head = ({}, {"softcap": 5.0, "scale": 0.7})[i % 2]
        world.run(split_cases.of_hidden, name, V, options, head, i % 2 == 1)


@pytest.mark.parametrize("V", [515, 5, 2])
def test_dtensors(world, V):
    world.run(split_cases.of_dtensors, V)


def test_any_split_and_another_at_each_call(world):
    world.run(split_cases.splits_that_change)


@pytest.mark.parametrize("V, counting", [(515, 400), (515, 100), (8, 3), (4, 1)])
def test_vocab_size(world, V, counting):
    world.run(split_cases.vocabulary_ends_early, V, counting)


@pytest.mark.parametrize("backend, dtype", [("reference", F64), ("cpu", F32)])
def test_nan_and_infinities(world, backend, dtype):
    if available_backends()[backend] != "ok":
        pytest.skip(available_backends()[backend])
    world.run(split_cases.special_rows, backend, dtype)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_float32(world, shift):
    world.run(split_cases.in_float32, shift)


def test_16_bits(world):
    world.run(split_cases.in_16_bits)


def test_modules(world):
    world.run(split_calls.as_modules)


@pytest.mark.parametrize("world", [2], indirect=True)
def test_under_torch_compile(world):
    world.run(split_calls.compiled)


@pytest.mark.parametrize("world", [4], indirect=True)
def test_groups_beside_each_other(world):
    world.run(split_calls.two_by_two)


def test_gradients_in_place_and_again(world):
    world.run(split_calls.gradients_anew)


def test_collectives(world):
    world.run(split_calls.counted_collectives)


@pytest.mark.parametrize("V, dtype", [(515, F64), (515, F32), (5, F32), (2, F64)])
def test_tokens_are_those_of_one_process(world, V, dtype):
    world.run(split_calls.sampled, V, dtype)


def test_tokens_follow_the_law(world):
    counts = world.run(split_calls.drawn, 40_000)[0]
    expected = 40_000 * split_calls.law()
    assert ((counts - expected) ** 2 / expected).sum() < 48.3  # 99.9 % of chi-square with 22 degrees of freedom


def test_errors_are_those_of_all_ranks(world):
    world.run(split_calls.errors)
