"""What a loss asks of the host: few operators, none that waits for the device, none whose shape depends on values."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import minillm_kernels as mk
from minillm_kernels.hidden import matmul, ops
from minillm_kernels.rows import DIFFERENTIABLE

if mk.available_backends()["cpu"] != "ok":
    pytest.skip("the reference is made of many operators", allow_module_level=True)

N, H, V = 40, 16, 300
# No work on any device.
NOTHING = {"view", "reshape", "select", "slice", "expand", "detach", "as_strided", "unsqueeze", "squeeze", "t"}
NOTHING |= {"unbind", "promote_types", "result_type"}
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty"}
WAITS = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"}


def operators(run) -> tuple[list[str], set[str]]:
    """Those that Python and the autograd engine call, where they work; and all, those inside of others too."""
    run()  # whatever happens once
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    events = [e for e in found.events() if e.name.startswith(("aten::", "minillm::"))]
    inside = {e.id for event in events for e in _below(event)}
    outer = [e for e in events if e.id not in inside and not (e.name == "aten::to" and not e.cpu_children)]
    called = [e.name.partition("::")[2] for e in outer]
    return [name for name in called if name not in NOTHING], {e.name.partition("::")[2] for e in events}


def _below(event):
    for child in event.cpu_children:
        yield child
        yield from _below(child)


LABELS = torch.arange(N).masked_fill(torch.arange(N) % 3 == 0, -100)
OPTIONS = {
    "plain": {},
    "labels": {"labels": LABELS},
    "weights": {"weights": torch.arange(N) / N, "reduction": "mean"},
    "labels and weights": {"labels": LABELS, "weights": torch.arange(N) / N, "reduction": "mean"},
    "a normalizer": {"labels": LABELS, "normalizer": 100.0},
}


def loss_of(name: str, divergence: str, options: dict):
    if name == "logits":
        leaves = [torch.randn(N, V, requires_grad=True)]
        others = (torch.randn(N, V),)
    else:
        leaves = [torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)]
        others = (torch.randn(N, H), torch.randn(V, H))
    function = mk.fused_divergence_loss if name == "logits" else mk.fused_linear_divergence_loss

    def run():
        for leaf in leaves:
            leaf.grad = None
        function(*leaves, *others, divergence, **options).backward()

    return run


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("name", ["logits", "hidden states"])
def test_a_scalar_loss_and_its_backward_pass_are_at_most_six_operators(name, divergence, options):
    called, every = operators(loss_of(name, divergence, options))
    assert len(called) <= 6, called
    assert not every & WAITS


POLICY = {"advantages": torch.randn(N), "old_logprobs": torch.randn(N)}
OTHERS = {
    "cross entropy": (mk.distill_loss, {"student_logprobs": -1 / N}),
    "every statistic": (mk.distill_loss, {name: 0.5 for name in DIFFERENTIABLE}),
    "coefficients of each row": (mk.distill_loss, {name: torch.rand(N) for name in DIFFERENTIABLE}),
    "minillm": (mk.minillm_loss, POLICY),
    "minillm, all options": (
        mk.minillm_loss,
        {**POLICY, "importance_weights": torch.rand(N), "entropy_coef": 0.1, "normalizer": torch.tensor(100.0)},
    ),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("function", "options"), OTHERS.values(), ids=OTHERS)
def test_losses_of_tokens_are_at_most_six_operators_too(function, options, inplace):
    student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)

    def run():
        student.grad = None
        function(student.view(N, V), teacher, LABELS, inplace=inplace, **options).loss.backward()

    called, every = operators(run)
    assert len(called) <= 6, called
    assert not every & WAITS


PACKAGE = str(Path(mk.__file__).parent)


def cost(run) -> tuple[int, int]:
    """Of a call: the operators that do work, those that minillm's are made of among them and each of minillm's as one
    (on a GPU each is a launch or more), and the functions of minillm_kernels that Python enters (not torch's)."""
    run()  # whatever happens once
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    launches = 0
    for event in found.events():
        space, _, name = event.name.partition("::")
        launches += space == "minillm" or (space == "aten" and not _in_aten(event) and not _is_nothing(event, name))
    entered = 0

    def count(frame, happened: str, _argument: object) -> None:
        nonlocal entered
        entered += happened == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return launches, entered


def _in_aten(event) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith("aten::") or _in_aten(parent))


def _is_nothing(event, name: str) -> bool:
    return name in NOTHING | ALLOCATES or (name == "to" and not event.cpu_children)


UNIFORMS = torch.rand(N, 2, dtype=torch.float64)
IDS = torch.arange(N)
# name -> (the call, and at most how many operators and functions: of a constant student, and of one that is
# differentiated, with the backward pass, which begins with ones_like).
COSTS: dict[str, tuple[Callable, tuple[int, int], tuple[int, int] | None]] = {
    "fused_rkl_loss": (mk.fused_rkl_loss, (2, 60), (5, 86)),
    "fused_rkl_loss, labels": (lambda s, t: mk.fused_rkl_loss(s, t, LABELS), (10, 64), (12, 90)),
    "fused_rkl_loss, none": (lambda s, t: mk.fused_rkl_loss(s, t, reduction="none"), (1, 57), (6, 99)),
    "jsd": (lambda s, t: mk.fused_divergence_loss(s, t, "jsd"), (3, 93), (7, 121)),
    "token_logprobs": (lambda s, t: mk.token_logprobs(s, IDS), (2, 46), (9, 85)),
    "distill_stats": (lambda s, t: mk.distill_stats(s, t, IDS).reverse_kl, (2, 54), (19, 96)),
    "distill_loss": (lambda s, t: mk.distill_loss(s, t, IDS, student_logprobs=-1 / N).loss, (11, 73), (12, 97)),
    "minillm_loss": (lambda s, t: mk.minillm_loss(s, t, IDS, **POLICY).loss, (54, 82), (59, 124)),
    "mixed_sample": (lambda s, t: mk.mixed_sample(s, t, uniforms=UNIFORMS), (1, 54), None),
}


@pytest.mark.parametrize(("function", "forward", "both"), COSTS.values(), ids=COSTS)
def test_what_a_call_costs_the_host(function, forward, both):
    """A small batch is bound by the host. Counted, since a count does not depend on the machine."""
    student, teacher = torch.randn(N, V), torch.randn(N, V)
    assert all(map(int.__le__, found := cost(lambda: function(student, teacher)), forward)), (found, forward)
    if both is not None:
        student.requires_grad_()

        def differentiate() -> None:
            student.grad = None
            loss = function(student, teacher)
            (loss.sum() if loss.dim() else loss).backward()

        assert all(map(int.__le__, found := cost(differentiate), both)), (found, both)


def everything():
    leaves = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    models, ids = (*leaves, torch.randn(N, H), torch.randn(V, H)), LABELS
    constants = {"advantages": torch.randn(N), "old_logprobs": torch.randn(N)}
    stats = mk.fused_linear_distill_stats(*models, ids)
    logprobs, entropy = mk.fused_linear_token_logprobs(*leaves, ids, return_entropy=True)
    values = [
        stats.reverse_kl.sum() + stats.student_logprobs.sum(),
        logprobs.sum() + entropy.sum(),
        mk.fused_linear_divergence_loss(*models, "jsd", ids, reduction="none").sum(),
        mk.fused_linear_rkl_loss(*models, ids, reduction="none").sum(),
        mk.fused_linear_distill_loss(*models, ids, forward_kl=0.5, student_logprobs=-torch.ones(N)).loss,
        mk.fused_linear_minillm_loss(*models, ids, **constants).loss,
    ]
    sum(values).backward()


def test_no_function_of_hidden_states_waits_for_the_device():
    _, every = operators(everything)
    assert not every & WAITS


def test_gather_leaves_masked_rows_out_and_is_the_same_loss():
    found = {}
    for gather in (False, True):
        leaves = [torch.manual_seed(0) and torch.randn(s, H, dtype=torch.float64).requires_grad_() for s in (N, V)]
        models = (*leaves, leaves[0].detach().flip(0), leaves[1].detach().flip(0))
        options = {"labels": LABELS, "chunk_rows": 16, "gather": gather}
        _, every = operators(lambda m=models, o=options: mk.fused_linear_rkl_loss(*m, **o))
        assert ("nonzero" in every) == gather
        loss = mk.fused_linear_rkl_loss(*models, **options)
        loss.backward()
        found[gather] = [loss.detach(), *(x.grad for x in leaves)]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match='gather belongs to impl="chunked"'):
        mk.fused_linear_rkl_loss(*models, impl="tiled", gather=True)


@pytest.mark.parametrize("masked", [False, True])
def test_shapes_are_fixed(masked):
    """On tensors without values, where an operator that needs a value is an error."""
    rows, h, v = 5000, 32, 1000
    with FakeTensorMode():
        hidden, weight = torch.empty(rows, h).bfloat16(), torch.empty(v, h).bfloat16()
        heads = (hidden, weight, None, hidden, weight, None, [0.0, 0.0], [1.0, 1.0], 1.0, v, "chunked", 2048, False)
        weights = torch.ones(rows) if masked else None
        for divergence in ("reverse_kl", "jsd"):
            own = (weights, None, None, "batchmean", divergence, 0.5, [True, True, False])
            loss, *gradients = ops._linear_divergence_loss(*own, *heads, "reference")
            assert loss.shape == () and [x.dtype for x in gradients[:2]] == [torch.bfloat16, torch.float32]


def test_on_cuda_16_bit_products_are_added_to_fp32_in_one_matmul(monkeypatch):
    """Told by a tensor of a device that need not be there."""
    added = []

    def addmm(total, x, y, *, out_dtype, out):
        assert total is out and out.dtype == out_dtype == torch.float32
        added.append((x.shape, y.shape))

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(matmul, "_ADDS_TO_FP32", True)
    with FakeTensorMode():
        total, g, h = (torch.empty(shape, device="cuda") for shape in ((30, 4), (8, 30), (8, 4)))
        matmul.add_product(total, g.bfloat16().t(), h.bfloat16())
    assert added == [((30, 8), (8, 4))]
