"""Head: what it refuses, what it makes of hidden states, and Head(None), by which every function of hidden states is
its namesake on logits."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from linear_cases import BETA, CAP, SCALE, Case, N, T, V, assert_close, plain_logits

import minillm_kernels as mk
from minillm_kernels import Head

WEIGHT = torch.randn(7, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]],), TypeError, "the head's weight must be a tensor, got list"),
        ((WEIGHT.long(),), TypeError, "the head's weight must be a floating-point tensor, got torch.int64"),
        ((WEIGHT[0],), ValueError, r"the head's weight must be \[V, H\], got shape \(4,\)"),
        ((WEIGHT, torch.zeros(7).long()), TypeError, "the head's bias must be a floating-point tensor"),
        ((WEIGHT, torch.zeros(4)), ValueError, r"the head's bias must be \[7\], one number a row.*got shape \(4,\)"),
        ((WEIGHT, None, 0.0), ValueError, "softcap must be a finite number > 0, or None for none, got 0.0"),
        ((WEIGHT, None, float("nan")), ValueError, "softcap must be a finite number > 0"),
        ((WEIGHT, None, None, float("inf")), ValueError, "scale must be a finite number, got inf"),
        ((None, torch.zeros(7)), ValueError, r"Head\(None\) stands for logits that exist already: apply bias"),
        ((None, None, 30.0), ValueError, r"Head\(None\)"),
        ((None, None, None, 0.5), ValueError, r"Head\(None\)"),
    ],
)
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Head(*arguments)


def test_a_head_is_frozen_and_itself_alone():
    head = Head(WEIGHT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        head.scale = 2.0
    assert head == head and head != Head(WEIGHT)
    assert len({head, head, Head(WEIGHT)}) == 2


@pytest.mark.parametrize("cap", [None, CAP])
def test_logits(cap):
    """With a gradient and, by another library's matmul, without; of any leading dimensions."""
    case = Case(torch.float32)
    hidden, head, *_ = case.models(case.leaves(), cap)
    truth = plain_logits(case.student, case.teacher, cap)[0]
    logits = head.logits(hidden)
    assert logits.requires_grad and not head.detach().logits(hidden.detach()).requires_grad
    assert dataclasses.astuple(head)[2:] == dataclasses.astuple(head.detach())[2:] == (cap, SCALE[0])
    with torch.no_grad():
        each = [
            logits,
            head.logits(hidden),
            head.logits(hidden[:36].reshape(4, 9, -1)).flatten(0, 1),
            head.logits(hidden[0]),
        ]
    assert_close(each, [truth, truth, truth[:36], truth[0]], torch.float32)
    with pytest.raises(ValueError, match=r"hidden must be \[..., H\] and the weight of its head \[V, H\]"):
        head.logits(hidden[:, 1:])


def every_function(models, case):
    """What each function of hidden states gives: the loss that has a gradient, and other values."""
    ids, constants = case.labels, {"advantages": case.weights - 0.5, "old_logprobs": torch.full((), -6.0)}
    logprobs, entropy = mk.fused_linear_token_logprobs(*models[:2], ids, return_entropy=True, temperature=T)
    stats = mk.fused_linear_distill_stats(*models, ids, temperature=T)
    coefficients = {"reverse_kl": case.weights, "student_logprobs": -0.5, "student_logsumexp": 0.1}
    distilled = mk.fused_linear_distill_loss(*models, ids, temperature=T, **coefficients)
    learnt = mk.fused_linear_minillm_loss(*models, ids, entropy_coef=0.1, temperature=T, **constants)
    options = {"weights": case.weights, "temperature": T}
    return {
        "rkl": (mk.fused_linear_rkl_loss(*models, ids, **options),),
        "jsd": (mk.fused_linear_divergence_loss(*models, "jsd", ids, beta=BETA, **options),),
        "per row": (mk.fused_linear_divergence_loss(*models, "tvd", ids, reduction="none", **options).sum(),),
        "logprobs": ((logprobs - entropy).sum(), logprobs, entropy),
        "stats": (stats.reverse_kl.sum() + stats.student_entropy.sum(), *stats),
        "distill": (distilled.loss, *distilled.stats),
        "cross entropy": (mk.fused_linear_distill_loss(*models[:2], token_ids=ids, student_logprobs=-1.0).loss,),
        "minillm": tuple(learnt),
    }


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)], ids=["both", "student's", "teacher's"])
def test_logits_in_the_place_of_hidden_states(given):
    """Head(None) for either model, or for both: the same values, the same gradients."""
    case = Case(torch.float64)
    results = []
    for logits_of in ((False, False), given):
        leaves = case.leaves()
        student, head, teacher, teacher_head = case.models(leaves, CAP)
        models = [
            *((head.logits(student), Head(None)) if logits_of[0] else (student, head)),
            *((teacher_head.logits(teacher), Head(None)) if logits_of[1] else (teacher, teacher_head)),
        ]
        for loss, *values in every_function(models, case).values():
            gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
            results.append([loss.detach(), *(x.detach() for x in values), *gradients])
    half = len(results) // 2
    for hidden, logits in zip(results[:half], results[half:], strict=True):
        assert_close(logits, hidden, torch.float64)


def test_a_teachers_constants_and_unknown_heads():
    case = Case(torch.float32)
    student, head, teacher, teacher_head = case.models(case.student)
    trained = Head(teacher_head.weight.clone().requires_grad_())
    for hidden, constant in ((teacher, trained), (trained.logits(teacher), Head(None))):
        with pytest.raises(ValueError, match="the teacher is a constant here"):
            mk.fused_linear_rkl_loss(student, head, hidden, constant)
    mk.fused_linear_rkl_loss(student, head, teacher, trained.detach())
    with pytest.raises(TypeError, match=r"a head must be its weight .* got Linear: pass lm_head.weight"):
        mk.fused_linear_token_logprobs(student, torch.nn.Linear(4, V), case.labels)
    with pytest.raises(TypeError, match="student_logits must be a tensor"):
        mk.fused_linear_rkl_loss([1.0], Head(None), teacher, teacher_head)


def test_a_head_compiles_into_one_graph():
    case = Case(torch.float32)

    def loss_of(hidden, weight, bias):
        student, teacher = Head(weight, bias, CAP, 0.5), Head(*case.teacher[1:], CAP)
        return mk.fused_linear_rkl_loss(hidden, student, case.teacher[0], teacher, case.labels)

    results = []
    for fn in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        loss = fn(*leaves)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    assert_close(results[1], results[0], torch.float32)


def test_ids_of_a_narrow_type_are_not_taken_for_ignore_index():
    """-100 in uint8 is 156, a token."""
    case = Case(torch.float32)
    ids = torch.full((N,), 156)
    hidden, head, *teacher = case.models(case.student)
    plain = F.log_softmax(plain_logits(case.student, case.teacher, None)[0], -1)[:, 156]
    assert_close([mk.fused_linear_token_logprobs(hidden, head, ids.to(torch.uint8))], [plain], torch.float32)
    losses = [mk.fused_linear_rkl_loss(hidden, head, *teacher, x) for x in (ids.to(torch.uint8), ids)]
    assert losses[0] == losses[1] and losses[0] > 0
