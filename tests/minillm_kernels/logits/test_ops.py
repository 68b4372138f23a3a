"""torch.ops.minillm: schemas, fakes and autograd by torch.library.opcheck; torch.compile, dynamic shapes, vmap."""

import shutil

import oracle
import pytest
import torch
from cases import BF16, FP32, NAMES, Case
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import minillm_kernels as mk
from minillm_kernels import last_backend, use_backend

OPS = torch.ops.minillm
SETTINGS = (0.7, 60, "auto")  # temperature, vocab_size, backend
LEADING = {"rows": (4,), "one-row": (), "no-rows": (0,), "3-D": (2, 3)}


def _samples(leading, dtype, teacher=True, grad=True):
    """Arguments of every operator, as the public functions and their backward passes give them."""
    s = torch.randn(*leading, 70).to(dtype).requires_grad_(grad)
    t = torch.randn(*leading, 64) if teacher else None
    ids, mask = torch.randint(60, leading), torch.rand(leading) < 0.8
    stats = OPS.row_stats(s.detach(), t, ids, mask, False, *SETTINGS)
    coefficients = torch.randn(5, *leading)
    samples = {
        "row_stats": (s, t, ids, mask, False, *SETTINGS),
        "row_grad": (s.detach(), t, ids, stats, coefficients, *SETTINGS),
        "row_grad_": (s.detach().clone(), t, ids, stats, coefficients, *SETTINGS),
        "row_sample": (
            s.detach(),
            t,
            torch.rand(*leading, 2).double(),
            0.2 if teacher else 0.0,
            1.0,
            5,
            0.9,
            60,
            "auto",
        ),
    }
    if teacher:
        values = OPS.row_divergence(s.detach(), t, mask, stats, False, "jsd", 0.3, *SETTINGS)
        rest = (stats, values, torch.randn(leading), "jsd", 0.3, *SETTINGS)
        samples |= {
            "row_divergence": (s, t, mask, stats, False, "jsd", 0.3, *SETTINGS),
            "row_divergence_grad": (s.detach(), t, *rest),
            "row_divergence_grad_": (s.detach().clone(), t, *rest),
        }
    return samples


def test_the_operators_are_these():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("minillm::row_")}
    assert {f"minillm::{name}" for name in _samples((4,), FP32)} == registered


@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float64], ids=NAMES.get)
@pytest.mark.parametrize("name", _samples((1,), FP32))
def test_opcheck(name, dtype, leading):
    opcheck(getattr(OPS, name).default, _samples(leading, dtype)[name])


@pytest.mark.parametrize("name", ["row_stats", "row_grad", "row_grad_", "row_sample"])
def test_opcheck_without_a_teacher(name):
    opcheck(getattr(OPS, name).default, _samples((4,), FP32, teacher=False)[name])


def _called(name: str, **other):
    """An operator called with other arguments than it should be."""
    operator = getattr(OPS, name).default
    arguments = dict(
        zip((x.name for x in operator._schema.arguments), _samples((4,), FP32, grad=False)[name], strict=True)
    )
    return operator(**arguments | other)


SHORT, META = torch.zeros(3), torch.zeros(4, device="meta")
# What each operator is given instead: kernels would read beyond it, or something else.
WRONG = {
    "vocab_size": [0, -1, 65, 1 << 40],
    "temperature": [-1.0, 1e-39, float("nan")],
    "teacher": [*(torch.randn(*shape) for shape in ((3, 64), (4, 59), (2, 2, 64))), torch.randn(4, 64, device="meta")],
    "backend": ["abacus"],
    "token_ids": [SHORT.long(), torch.zeros(4), META.long()],
    "mask": [SHORT.bool(), torch.ones(4), META.bool()],
    "stats": [torch.zeros(11, 3), torch.zeros(10, 4), torch.zeros(44), torch.zeros(11, 4, device="meta")],
    "coefficients": [torch.zeros(5, 3), torch.zeros(4, 4), torch.zeros(5, 4, dtype=BF16)],
    "values": [torch.zeros(2, 3), torch.zeros(1, 4), torch.zeros(8)],
    "scale": [SHORT, torch.zeros(1, 4), META],
    "divergence": ["kl", "reverse_kl", ""],
    "beta": [-0.1, 2.0, float("nan")],
    "uniforms": [
        torch.zeros(3, 2).double(),
        torch.zeros(4, 1).double(),
        torch.zeros(4, 2),
        -torch.ones(4, 2).double(),
    ],
    "alpha": [-0.5, 1.5, float("nan")],
    "top_k": [-1],
    "top_p": [0.0, -1.0, 1.5, float("nan")],
}


@pytest.mark.parametrize("name", _samples((1,), FP32))
@pytest.mark.parametrize("used", ["cpu", "reference"])
def test_an_operator_called_with_arguments_that_do_not_fit(name, used):
    taken = {x.name for x in getattr(OPS, name).default._schema.arguments}
    for key, value in ((key, value) for key, values in WRONG.items() if key in taken for value in values):
        with pytest.raises((ValueError, KeyError)):
            _called(name, **{"backend": used, key: value})
            pytest.fail(f"{key} = {value} was taken")
    with pytest.raises((ValueError, IndexError)):
        _called(name, student=torch.zeros(()), backend=used)
    if used == "cpu":
        columns_apart = torch.randn(4, 140)[:, ::2]
        with pytest.raises(ValueError, match="stride 1"):
            _called(name, student=columns_apart, backend=used)


def test_a_sample_without_the_teacher_that_it_asks_for():
    with pytest.raises(ValueError, match="samples from the teacher too"):
        _called("row_sample", teacher=None)


@pytest.mark.parametrize("name", ["row_grad_", "row_divergence_grad_"])
def test_an_operator_that_would_overwrite_what_it_reads(name):
    z = torch.randn(5, 70)
    for other in ({"student": z[1:], "teacher": z[:-1]}, {"student": torch.randn(70).expand(4, 70)}):
        with pytest.raises(ValueError, match="inplace=True cannot write a gradient"):
            _called(name, **other)


IDS = torch.tensor([3, -100, 59, 0])
WEIGHTS = torch.tensor([1.0, 2.0, 0.0, 0.5])
UNIFORMS = torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def _stats(s, t, **options):
    stats = mk.distill_stats(s, t, IDS, **options)
    return sum(getattr(stats, f).sum() for f in oracle.DIFFERENTIABLE)


def _sample(s, t):
    x = mk.mixed_sample(s, t, uniforms=UNIFORMS, top_k=20, top_p=0.9)
    return mk.token_logprobs(s, x.token_ids).sum() + x.mixture_logprobs.sum()


def _logprobs(s, t):
    logprobs, entropy = mk.token_logprobs(s, IDS, temperature=2.0, return_entropy=True)
    return (logprobs - 0.1 * entropy).sum()


LEARNT = {"advantages": WEIGHTS, "old_logprobs": torch.full((4,), -3.0), "entropy_coef": 0.1}


def _head(states):
    return torch.linspace(-1, 1, 60 * 60).view(60, 60).to(states.dtype)


FUNCTIONS = {
    "fused_rkl_loss": lambda s, t: mk.fused_rkl_loss(s, t, IDS, weights=WEIGHTS, temperature=2.0),
    "fused_rkl_loss-inplace": lambda s, t: mk.fused_rkl_loss(s * 2, t, inplace=True),
    "FusedRKLLoss": lambda s, t: mk.FusedRKLLoss(reduction="mean")(s, t, IDS),
    "forward_kl": lambda s, t: mk.fused_divergence_loss(s, t, "forward_kl", reduction="sum"),
    "jsd": lambda s, t: mk.fused_divergence_loss(s, t, "jsd", IDS, beta=0.3),
    "jsd-inplace": lambda s, t: mk.fused_divergence_loss(s * 2, t, "jsd", inplace=True),
    "skew_forward_kl": lambda s, t: mk.fused_divergence_loss(s, t, "skew_forward_kl", normalizer=3.0),
    "skew_reverse_kl": lambda s, t: mk.fused_divergence_loss(s, t, "skew_reverse_kl", reduction="none").sum(),
    "tvd": lambda s, t: mk.fused_divergence_loss(s, t, "tvd", vocab_size=50),
    "token_logprobs": _logprobs,
    "distill_stats": _stats,
    "distill_loss": lambda s, t: mk.distill_loss(s, t, IDS, reverse_kl=WEIGHTS, student_logprobs=-0.5).loss,
    "distill_loss-inplace": lambda s, t: mk.distill_loss(s * 2, t, IDS, forward_kl=0.5, inplace=True).loss,
    "mixed_sample": _sample,
    "minillm_loss": lambda s, t: mk.minillm_loss(s, t, IDS, **LEARNT).loss,
    "fused_linear_minillm_loss": lambda s, t: (
        mk.fused_linear_minillm_loss(s, _head(s), t, _head(t), IDS, **LEARNT).loss
    ),
}


def _value_and_gradient(function, s, t):
    x = s.clone().requires_grad_()
    value = function(x, t)
    (grad,) = torch.autograd.grad(value, x)
    return value.detach(), grad


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.namespaces.add(func.namespace)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_eager_call_needs_no_dispatcher_and_a_mode_sees_the_operators(name, monkeypatch):
    s, t = Case(60, (4,)).logits()
    with monkeypatch.context() as patched:
        patched.setattr(torch.ops, "minillm", None)
        eager = _value_and_gradient(FUNCTIONS[name], s, t)
    with _Seen() as seen:
        dispatched = _value_and_gradient(FUNCTIONS[name], s, t)
    assert "minillm" in seen.namespaces
    for a, b in zip(eager, dispatched, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=NAMES.get)
def test_compile_fullgraph(fresh_compiler, name, dtype):
    function = FUNCTIONS[name]
    s, t = Case(60, (4,), dtype).logits()
    eager = _value_and_gradient(function, s, t)
    compiled = _value_and_gradient(torch.compile(function, fullgraph=True, backend="aot_eager"), s, t)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)


def test_inductor(fresh_compiler):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")

    def step(s, t):
        return FUNCTIONS["fused_rkl_loss"](s, t) + FUNCTIONS["jsd-inplace"](s, t) + _stats(s, t)

    s, t = Case(60, (4,)).logits()
    eager = _value_and_gradient(step, s, t)
    compiled = _value_and_gradient(torch.compile(step, fullgraph=True), s, t)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["fused_rkl_loss", "jsd", "mixed_sample"])
def test_dynamic_shapes(fresh_compiler, name):
    """One graph for every number of rows and columns."""
    functions = {
        "fused_rkl_loss": lambda s, t: mk.fused_rkl_loss(s, t),
        "jsd": lambda s, t: mk.fused_divergence_loss(s, t, "jsd"),
        "mixed_sample": lambda s, t: mk.token_logprobs(s, mk.mixed_sample(s, t, temperature=0.0).token_ids).sum(),
    }
    function = functions[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    _value_and_gradient(compiled, *Case(60, (4,)).logits())
    with torch.compiler.set_stance("fail_on_recompile"):
        for V, rows in ((61, 4), (300, 7), (2050, 3)):
            s, t = Case(V, (rows,)).logits()
            for a, b in zip(_value_and_gradient(function, s, t), _value_and_gradient(compiled, s, t), strict=True):
                assert torch.equal(a, b)


def test_compiled_graphs_run_on_every_backend(fresh_compiler, backend):
    s, t = Case(60, (4,)).logits()
    function = FUNCTIONS["distill_stats"]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(_value_and_gradient(compiled, s, t), _value_and_gradient(function, s, t), strict=True):
        assert torch.equal(a, b)
    assert last_backend() == backend


def test_rows_beyond_32_bits_of_offset(backend):
    """The second row starts 2^31 + 14 elements behind the first: 4 GiB of addresses, of which two rows are touched."""
    if backend == "reference":
        pytest.skip("plain PyTorch")
    far = torch.empty(2**31 + 5000, dtype=BF16).as_strided((2, 2101), (2**31 + 14, 1))
    far.copy_(torch.randn(2, 2101))
    near, t, ids = far.clone(), torch.randn(2, 2101), torch.tensor([0, 5])
    for a, b in zip(mk.distill_stats(far, t, ids), mk.distill_stats(near, t, ids), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # Triton starts its tiles where a row is aligned


def test_a_compiled_graph_sees_use_backend(fresh_compiler):
    compiled = torch.compile(lambda s, t: mk.fused_rkl_loss(s, t), fullgraph=True, backend="aot_eager")
    s, t = Case(60, (4,)).logits()
    s.requires_grad_()
    for name in ("cpu", "reference", "cpu"):
        with use_backend(name):
            loss = compiled(s, t)
        assert last_backend() == name
        loss.backward()
        assert last_backend() == name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_is_refused(name):
    s, t = torch.randn(3, 4, 60), torch.randn(3, 4, 60)
    with pytest.raises(NotImplementedError, match=r"vmap over minillm_kernels is not supported.*leading dimensions"):
        torch.func.vmap(FUNCTIONS[name])(s, t)


def test_inference_mode(backend):
    s, t = Case(60, (4,)).logits()
    expected = mk.fused_rkl_loss(s, t), mk.token_logprobs(s, IDS), mk.mixed_sample(s, t, uniforms=UNIFORMS)
    with torch.inference_mode():
        actual = mk.fused_rkl_loss(s, t), mk.token_logprobs(s, IDS), mk.mixed_sample(s, t, uniforms=UNIFORMS)
    assert torch.equal(expected[0], actual[0]) and torch.equal(expected[1], actual[1])
    assert torch.equal(expected[2].token_ids, actual[2].token_ids)


@pytest.mark.parametrize("name", _samples((1,), FP32))
def test_forward_mode_is_refused_in_operators_called_directly(name):
    """Below autograd no operator sees a tangent: its derivative would be 0, or none, without a word."""
    operator, samples = getattr(OPS, name).default, _samples((4,), FP32, grad=False)[name]
    for i, x in enumerate(samples):
        if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
            continue

        def function(y, i=i):
            return operator(*samples[:i], y, *samples[i + 1 :])

        expected = {"expected_exception": RuntimeError, "match": "carry a tangent, but minillm_kernels has no forward"}
        with pytest.raises(**expected):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))
        with pytest.raises(**expected):
            torch.func.jacfwd(function)(x)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(**expected):
            function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
