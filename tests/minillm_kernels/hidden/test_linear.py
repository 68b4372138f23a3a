"""fused_linear_*: equal to the same loss on logits in float64, value and every gradient, whatever the chunks."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from linear_cases import BETA, CAP, H_T, Case, H, N, T, V, assert_close, plain_logits
from torch import Tensor

import minillm_kernels as mk
from minillm_kernels.hidden import chunked
from minillm_kernels.hidden.operands import operands
from minillm_kernels.logits.losses import REDUCTIONS
from minillm_kernels.rows import DIVERGENCES


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_divergences_equal_the_loss_on_logits(dtype, divergence, reduction, cap):
    case = Case(dtype)
    options = {"weights": case.weights, "temperature": T, "beta": BETA, "reduction": reduction}
    upstream = torch.linspace(0.5, 1.5, N).to(case.weights.dtype) if reduction == "none" else torch.tensor(1.7)

    truth = case.leaves()
    z_s, z_t = plain_logits(truth, case.teacher, cap)
    wanted = mk.fused_divergence_loss(z_s, z_t, divergence, case.labels, **options)
    wanted.backward(upstream.to(wanted.dtype))

    ours = case.leaves()
    loss = mk.fused_linear_divergence_loss(*case.models(ours, cap), divergence, case.labels, chunk_rows=5, **options)
    loss.backward(upstream.to(loss.dtype))
    assert_close([loss.detach(), *(x.grad for x in ours)], [wanted.detach(), *(x.grad for x in truth)], dtype)
    assert (ours[0].grad[case.labels == -100] == 0).all() and (ours[0].grad[4] == 0).all()


def test_bf16_gradients_accumulate_in_fp32():
    """4096 rows in chunks of 16 push the same direction into the weight: 256 additions in bf16 would lose it."""
    generator = torch.Generator().manual_seed(0)
    hidden = (1 + 0.01 * torch.randn(4096, 8, generator=generator)).bfloat16()
    weight = (torch.randn(33, 8, generator=generator) * 0.1).bfloat16().requires_grad_()
    teacher = (torch.randn(33, 8, generator=generator)).bfloat16()
    mk.fused_linear_rkl_loss(hidden, weight, hidden, teacher, reduction="sum", chunk_rows=16).backward()
    exact = weight.detach().double().requires_grad_()
    mk.fused_rkl_loss(hidden.double() @ exact.t(), hidden.double() @ teacher.double().t(), reduction="sum").backward()
    assert_close([weight.grad], [exact.grad], torch.bfloat16)
    assert ((weight.grad.double() - exact.grad).norm() / exact.grad.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_distill_stats_and_token_logprobs(dtype):
    case = Case(dtype)
    fields = ("reverse_kl", "forward_kl", "student_logprobs", "student_entropy", "student_logsumexp")

    def total(stats) -> Tensor:
        return sum((i + 1) * getattr(stats, name).sum() for i, name in enumerate(fields))

    truth = case.leaves()
    z_s, z_t = plain_logits(truth, case.teacher, None)
    wanted = mk.distill_stats(z_s, z_t, case.labels, temperature=T)
    total(wanted).backward()
    ours = case.leaves()
    stats = mk.fused_linear_distill_stats(*case.models(ours), case.labels, temperature=T, chunk_rows=8)
    total(stats).backward()
    assert_close([*stats, *(x.grad for x in ours)], [*wanted, *(x.grad for x in truth)], dtype)

    logprobs, entropy = mk.fused_linear_token_logprobs(
        *case.models(case.student)[:2], case.labels, return_entropy=True
    )
    alone = mk.token_logprobs(z_s, case.labels, return_entropy=True)
    assert_close([logprobs, entropy], list(alone), dtype)


COEFFICIENTS = {
    "cross entropy": {"student_logprobs": -0.1},
    "distillation with labels": {"forward_kl": 0.05, "student_logprobs": -0.05},
    "everything": {
        **{"reverse_kl": 0.3, "forward_kl": 0.2, "student_logprobs": -1.0},
        **{"student_entropy": 0.1, "student_logsumexp": 0.5},
    },
}


@pytest.mark.parametrize("impl", ["chunked", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_losses_linear_in_the_statistics(name, dtype, impl):
    """Numbers and tensors as coefficients; rows that do not count hold NaN."""
    if impl == "tiled" and (dtype == torch.float64 or mk.available_backends()["triton"] != "ok"):
        pytest.skip("the tiled kernels are Triton's, in fp32 and 16-bit types")
    case, given = Case(dtype), COEFFICIENTS[name]
    mask, alone = case.labels != -100, name == "cross entropy"
    truth, ours = case.leaves(), case.leaves()
    z_s, z_t = plain_logits(truth, case.teacher, None)
    if alone:
        wanted = -0.1 * mk.token_logprobs(z_s, case.labels, temperature=T)[mask].sum()
    else:
        stats = mk.distill_stats(z_s, z_t, case.labels, temperature=T)
        per_row = [c * getattr(stats, field) for field, c in given.items()]
        wanted = (torch.stack(per_row).sum(0) * case.weights).sum()
        given = {field: c * case.weights for field, c in given.items()}
    wanted.mul(1.7).backward()
    with torch.no_grad():
        ours[0][~mask] = torch.nan
    student, teacher = case.models(ours)[:2], (None, None) if alone else case.models(ours)[2:]
    options = {"temperature": T, "impl": impl, "chunk_rows": 8 if impl == "chunked" else None}
    loss, found = mk.fused_linear_distill_loss(*student, *teacher, case.labels, **given, **options)
    loss.mul(1.7).backward()
    assert_close([loss.detach(), *(x.grad for x in ours)], [wanted.detach(), *(x.grad for x in truth)], dtype)
    assert (ours[0].grad[~mask] == 0).all() and (found.student_logprobs[~mask] == 0).all()


def test_losses_linear_in_the_statistics_need_what_they_are_made_of():
    case = Case(torch.float32)
    student, teacher = case.student[:2], case.teacher[:2]
    with pytest.raises(ValueError, match="reverse_kl needs a teacher"):
        mk.fused_linear_distill_loss(*student, reverse_kl=1.0)
    with pytest.raises(ValueError, match="student_logprobs needs token_ids"):
        mk.fused_linear_distill_loss(*student, student_logprobs=1.0)
    with pytest.raises(ValueError, match="come together"):
        mk.fused_linear_distill_loss(*student, teacher[0], reverse_kl=1.0)
    with pytest.raises(ValueError, match="student_logprobs must broadcast"):
        mk.fused_linear_distill_loss(*student, token_ids=case.labels, student_logprobs=torch.ones(3))
    with pytest.raises(ValueError, match="every coefficient is 0"):
        mk.fused_linear_distill_loss(*student, *teacher)


def test_frozen_head_tied_weight_and_accumulation_into_grad():
    case = Case(torch.float64)
    hidden, weight, _ = case.leaves()
    frozen = weight.detach()
    mk.fused_linear_rkl_loss(hidden, frozen, *case.teacher[:2]).backward()
    assert hidden.grad is not None and frozen.grad is None

    # Tied: the embedding that made the hidden states is the head; both ways add up, and into what .grad holds already.
    ids = torch.arange(N)
    weight.grad = torch.ones_like(weight)
    mk.fused_linear_rkl_loss(F.embedding(ids, weight), weight, *case.teacher[:2]).backward()
    exact = weight.detach().clone().requires_grad_()
    mk.fused_rkl_loss(F.embedding(ids, exact) @ exact.t(), case.teacher[0] @ case.teacher[1].t()).backward()
    assert_close([weight.grad - 1], [exact.grad], torch.float64)


def test_rows_of_weight_zero_are_not_read_and_nothing_valid_gives_zero():
    case = Case(torch.float32)
    hidden, weight, _ = case.leaves()
    with torch.no_grad():
        hidden[case.labels == -100] = float("nan")
    loss = mk.fused_linear_rkl_loss(hidden, weight, *case.teacher[:2], case.labels)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all()
    assert (hidden.grad[case.labels == -100] == 0).all()
    for labels, rows in ((torch.full((N,), -100), hidden), (torch.empty(0, dtype=torch.long), hidden[:0])):
        nothing = mk.fused_linear_rkl_loss(rows, weight, case.teacher[0][: len(rows)], case.teacher[1], labels)
        nothing.backward()
        assert nothing == 0


def test_transposed_hidden_states_and_weights():
    case = Case(torch.float32)
    found = []
    for strided in (False, True):
        leaves = [x.t().contiguous().t() if strided and x.dim() == 2 else x for x in case.student]
        leaves = [x.detach().requires_grad_() for x in leaves]
        (mk.fused_linear_rkl_loss(*case.models(leaves), case.labels) * 1.7).backward()
        found.append([x.grad for x in leaves])
    assert_close(*found, torch.float32)


def test_value_without_gradient_and_leading_dimensions():
    case = Case(torch.float64)
    with torch.no_grad():
        flat = mk.fused_linear_rkl_loss(case.student[0][:36], case.student[1], case.teacher[0][:36], case.teacher[1])
        folded = mk.fused_linear_rkl_loss(
            case.student[0][:36].view(4, 9, H), case.student[1], case.teacher[0][:36].view(4, 9, H_T), case.teacher[1]
        )
        per_row = mk.fused_linear_rkl_loss(
            case.student[0][:36].view(4, 9, H),
            case.student[1],
            case.teacher[0][:36].view(4, 9, H_T),
            case.teacher[1],
            reduction="none",
        )
    assert flat == folded and per_row.shape == (4, 9)
    assert torch.allclose(per_row.mean(), flat)


def test_module_form_and_same_bits_again():
    case = Case(torch.float32)
    module = mk.FusedLinearRKLLoss(temperature=T, reduction="mean", chunk_rows=7)
    results = []
    for _ in range(2):
        hidden, weight, bias = case.leaves()
        loss = module(hidden, mk.Head(weight, bias), *case.teacher[:2], case.labels)
        loss.backward()
        results.append([loss, hidden.grad, weight.grad, bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ValueError, match="unknown reduction"):
        mk.FusedLinearRKLLoss(reduction="average")


def test_autocast_casts_as_linear_does():
    case = Case(torch.float32)
    hidden, weight, _ = case.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mk.fused_linear_rkl_loss(hidden, weight, *case.teacher[:2])
        logits = [F.linear(*x[:2]) for x in (case.student, case.teacher)]
    loss.backward()
    assert logits[0].dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert torch.allclose(loss, mk.fused_rkl_loss(*logits), rtol=1e-3)


@pytest.mark.parametrize("name", ["rkl", "distill"])
def test_compiles_into_one_graph(name):
    case = Case(torch.float32)

    def loss_of(hidden, weight):
        args = (hidden, weight, *case.teacher[:2], case.labels)
        if name == "rkl":
            return mk.fused_linear_rkl_loss(*args, chunk_rows=16)
        coefficients = {"forward_kl": case.weights, "student_logprobs": -0.5}
        return mk.fused_linear_distill_loss(*args, chunk_rows=16, **coefficients).loss

    results = []
    for fn in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        hidden, weight, _ = case.leaves()
        loss = fn(hidden, weight)
        loss.backward()
        results.append([loss.detach(), hidden.grad, weight.grad])
    assert_close(results[1], results[0], torch.float32)


@pytest.mark.parametrize(
    "name", ["linear_stats", "linear_stats_loss", "linear_divergence", "linear_divergence_loss", "linear_minillm_loss"]
)
@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, False, False]], ids=str)
def test_opcheck(name, needs):
    """And what an operator returns shares no memory with its inputs, nor one result with another."""
    case = Case(torch.float32)
    heads = [*case.leaves(), *case.teacher]
    mask = case.labels != -100
    ids = case.labels.clamp(min=0)
    settings = ([0.0, 0.0], [1.0, 1.0], 1.0, V, "chunked", 8, False, "reference")
    args = {
        "linear_stats": (ids, mask),
        "linear_stats_loss": (ids, mask, torch.rand(5, N) * mask, needs),
        "linear_divergence": (mask, "jsd", BETA),
        "linear_divergence_loss": (case.weights, None, None, "mean", "jsd", BETA, needs),
        "linear_minillm_loss": (ids, mask, torch.ones(4, N), torch.tensor(0.1), 0.2, 0.0, needs),
    }[name]
    inputs = (*args, *heads, *settings)
    operator = getattr(torch.ops.minillm, name).default
    with torch.no_grad():
        found = operator(*inputs)
    tensors = [x for x in (*inputs, *(found if isinstance(found, tuple) else (found,))) if isinstance(x, torch.Tensor)]
    assert len({x.untyped_storage()._cdata for x in tensors}) == len(tensors)
    if all(needs):
        torch.library.opcheck(operator, inputs)


def test_bad_input():
    case = Case(torch.float32)
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    good = dict(zip(names, case.models(case.student, scale=(1.0, 1.0)), strict=True))
    weight, bias = case.student[1:]
    bad = [
        ({"student_head": weight.t()}, ValueError, r"student_hidden must be \[..., H\]"),
        ({"student_hidden": [1.0]}, TypeError, "student_hidden must be a tensor, got list"),
        ({"teacher_hidden": case.teacher[0].long()}, TypeError, "teacher_hidden must be a floating-point tensor"),
        ({"student_head": torch.nn.Linear(H, V)}, TypeError, "got Linear: pass lm_head.weight, or Head"),
        ({"teacher_hidden": case.teacher[0][:5]}, ValueError, "same leading shape"),
        ({"student_head": mk.Head(weight, bias.double())}, TypeError, "the bias of student_head is torch.float64"),
        ({"student_hidden": case.student[0].double()}, TypeError, "cast one of them"),
        ({"student_hidden": case.student[0].to("meta")}, ValueError, "move one of them"),
        ({"teacher_head": case.teacher[1].clone().requires_grad_()}, ValueError, "the teacher is a constant"),
        ({"vocab_size": 1002}, ValueError, r"smaller head \(head sizes 1001 and 1010\)"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows"),
        ({"group": object()}, TypeError, "group must be a torch.distributed process group"),
    ]
    for changes, error, message in bad:
        with pytest.raises(error, match=message):
            mk.fused_linear_rkl_loss(**{**good, **changes})


def test_default_chunk_bounds_the_buffers():
    for vocab_size, dtype, models in (
        (49152, torch.float32, 2),
        (151936, torch.bfloat16, 2),
        (50257, torch.float32, 1),
    ):
        weight = torch.empty(vocab_size, 1, dtype=dtype)
        model = (weight[:1], mk.Head(weight))
        heads = operands(model, model if models == 2 else None, "chunked", None, False, 1.0, None)
        rows, element = chunked.default_chunk_rows(heads), dtype.itemsize
        assert rows % 16 == 0
        assert rows * vocab_size * element * models <= 96 << 20 or rows == 16


def test_the_chunks_of_a_gpu_follow_from_the_shape_of_the_matmuls():
    rows = chunked.chunk_rows_of_matmuls
    assert rows(4096, 2 * 2) == 2048  # both models' logits are half of the fp32 gradient of the weight
    assert rows(896, 2 * 2) == 1024 and rows(16384, 2 * 2) == 4096  # the bounds
    assert rows(5120, 2) == 4096 and rows(3072, 2 * 4) == 1024 and rows(5120, 2 * 2) == 2560


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("loss_of", ["rkl", "jsd", "distill", "minillm"])
def test_second_derivatives_and_second_backward_passes_are_refused(loss_of, dtype):
    """Rather than missing, or of gradients that were given away; in float16 none is."""
    case = Case(dtype)

    def make():
        leaves = case.leaves()
        models = case.models(leaves)
        if loss_of == "distill":
            return leaves, mk.fused_linear_distill_loss(*models, reverse_kl=0.1).loss
        if loss_of == "minillm":
            constants = dict.fromkeys(("advantages", "old_logprobs"), torch.ones(N))
            return leaves, mk.fused_linear_minillm_loss(*models, case.labels, **constants).loss
        return leaves, mk.fused_linear_divergence_loss(*models, "reverse_kl" if loss_of == "rkl" else loss_of)

    for i in range(3):
        leaves, loss = make()
        (grad,) = torch.autograd.grad(loss, leaves[i], create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivative.*without create_graph=True"):
            grad.square().sum().backward()
    leaves, loss = make()
    loss.backward(retain_graph=True)
    if dtype == torch.float16:
        return loss.backward()
    with pytest.raises(RuntimeError, match="a first backward pass has taken them: compute the loss again"):
        loss.backward()


def test_forward_mode_is_refused():
    """A tangent of 0 would pass for a derivative."""
    case = Case(torch.float32)
    for i in range(3):

        def loss(x, i=i):
            parts = [x if j == i else y for j, y in enumerate(case.student)]
            return mk.fused_linear_rkl_loss(*case.models(parts))

        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            torch.func.jvp(loss, (case.student[i],), (torch.ones_like(case.student[i]),))


@pytest.mark.parametrize("factor", [0.0, 1.0, 1.7])
def test_what_arrives_for_the_loss_multiplies_the_gradients(factor, backend):
    case = Case(torch.float32)
    found = []
    for name in (backend, "reference"):
        with mk.use_backend(name):
            leaves = case.leaves()
            (mk.fused_linear_rkl_loss(*case.models(leaves), case.labels) * factor).backward()
        found.append([x.grad for x in leaves])
    assert_close(*found, torch.float32)
    assert factor != 0 or not any(x.any() for x in found[0])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of resident memory is Linux's")
@pytest.mark.skipif(mk.available_backends()["cpu"] != "ok", reason="the reference scales into new memory")
@pytest.mark.parametrize("name", ["rkl", "minillm"])
def test_the_backward_pass_makes_nothing_of_the_weights_size(name):
    """The gradients are there since the forward pass; zeros for outputs that nobody asked about would be seen here."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    heads = [torch.randn(shape) for shape in ((4, 256), (131072, 256), (4, 256), (131072, 256))]  # a weight: 128 MiB
    hidden, weight = (x.requires_grad_() for x in heads[:2])
    if name == "rkl":
        loss = mk.fused_linear_rkl_loss(*heads)
    else:
        constants = dict.fromkeys(("advantages", "old_logprobs"), torch.ones(4))
        loss = mk.fused_linear_minillm_loss(*heads, torch.arange(4), **constants).loss
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    loss.backward()
    extra = resident("VmHWM") - before
    assert weight.grad.count_nonzero() > 0 and hidden.grad.count_nonzero() > 0
    assert extra < weight.nbytes / 4
