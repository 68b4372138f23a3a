"""ms-swift's GKD loss with ours: equal to the formula of its documentation, and to its own function where that is
installed (it needs no more than torch)."""

import importlib.util
from types import SimpleNamespace

import eager
import ms_swift_gkd as example
import pytest
import torch


def tensors(told):
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((2, 6), -100)
    labels[0, 2:5], labels[1, 1:3] = 7, 8
    student, teacher = torch.randn(2, 2, 9, 301, generator=generator).mul(3)[:, :, :6].clone()
    theirs = None
    if told:  # the teacher's prompt is longer
        theirs = torch.full((2, 9), -100)
        theirs[0, 5:8], theirs[1, 7:9] = 7, 8
        teacher = torch.randn(2, 9, 301, generator=generator) * 3
    return student.requires_grad_(), SimpleNamespace(full_logits=teacher, labels=theirs), labels


def formula(student, teacher, labels, beta, temperature):
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q, and the two ends: of ms-swift's page on GKD."""
    told = labels if teacher.labels is None else teacher.labels
    q = (student[labels != -100].double() / temperature).log_softmax(-1)
    p = (teacher.full_logits[told != -100].double() / temperature).log_softmax(-1)

    def kl(a, b):
        return (a.exp() * (a - b)).sum()

    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def measured(loss, student):
    (gradient,) = torch.autograd.grad(loss, student)
    return float(loss.detach()), gradient


def compare(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("told", [False, True])
def test_is_the_formula(told, beta, temperature):
    student, teacher, labels = tensors(told)
    total, count = example.gkd_loss(student, teacher, labels, beta, temperature)
    assert int(count) == 5
    compare(measured(total, student), measured(formula(student, teacher, labels, beta, temperature), student))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("told", [False, True])
def test_is_what_ms_swift_computes(told, beta, temperature):
    found = importlib.util.find_spec("swift")
    if found is None:
        pytest.skip("ms-swift is not installed: pip install --no-deps ms-swift")
    path = f"{next(iter(found.submodule_search_locations))}/rlhf_trainers/gkd_loss.py"
    spec = importlib.util.spec_from_file_location("gkd_loss_of_ms_swift", path)  # without the rest of the package
    theirs = importlib.util.module_from_spec(spec)
    pytest.MonkeyPatch().setitem(__import__("sys").modules, spec.name, theirs)
    spec.loader.exec_module(theirs)
    student, teacher, labels = tensors(told)
    output = theirs.TeacherOutput(full_logits=teacher.full_logits, labels=teacher.labels)
    expected, tokens = theirs.gkd_loss(student, output, labels, beta, temperature)
    total, count = example.gkd_loss(student, output, labels, beta, temperature)
    assert int(count) == int(tokens)
    compare(measured(total, student), measured(expected, student))


def test_runs_as_a_script():
    eager.run_script("ms_swift_gkd")
