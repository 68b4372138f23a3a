"""What is Triton's own: when it is imported, what it refuses, guard bands around every buffer, rows that are split.

The shared tests run on it too, in its interpreter (cases.INTERPRETED says which).
"""

import pytest
import torch
from cases import BF16, FP32, Case
from processes import in_a_process

import minillm_kernels as mk
from minillm_kernels import available_backends, use_backend
from minillm_kernels.backends import reference
from minillm_kernels.backends import triton as backend
from minillm_kernels.rows import Pair

if not backend.interpreted() or available_backends()["triton"] != "ok":
    pytest.skip("needs Triton's interpreter: " + available_backends()["triton"], allow_module_level=True)
launch = pytest.importorskip("minillm_kernels.backends.triton.launch")
tune = pytest.importorskip("minillm_kernels.backends.triton.tune")

GUARD = 64  # elements on each side of a buffer
CANARY = -77.0


def everything(s, t, **options):
    """Values and gradients of every row operation."""
    x = s.detach().requires_grad_()
    ids = torch.arange(x.shape[:-1].numel()).reshape(x.shape[:-1]) % 7
    stats = mk.distill_stats(x, t, ids)
    values = [*stats, mk.token_logprobs(x, ids), *(mk.fused_divergence_loss(x, t, d, reduction="none") for d in LAWS)]
    total = sum((i + 1) * v.sum() for i, v in enumerate(values) if v.requires_grad)
    uniforms = torch.rand(*x.shape[:-1], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sample = mk.mixed_sample(x, t, 0.4, uniforms=uniforms, **options)
    return [*(v.detach() for v in values), torch.autograd.grad(total, x)[0], *sample]


LAWS = ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")


def assert_same(actual, expected, tolerance=3e-6):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def test_importing_the_package_imports_no_triton():
    code = "import torch, sys; had = 'triton' in sys.modules; import minillm_kernels as mk; mk.available_backends()\n"
    result = in_a_process(code + "print(had, 'triton' in sys.modules)")
    assert result.stdout.split() in (["False", "False"], ["True", "True"]), result.stderr


def test_without_the_interpreter_a_cpu_tensor_is_refused():
    code = "import minillm_kernels as mk\nmk.use_backend('triton').__enter__()"
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: the backend is available")
    message = in_a_process(code, TRITON_INTERPRET="0").stderr
    assert "no CUDA device; set TRITON_INTERPRET=1 before Python starts" in message


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "Triton is not installed"),
        ("3.5.1", "needs Triton 3.6 or newer, installed is 3.5.1; `pip install -U triton`"),
        ("3.6.0", None),
        ("3.10.1+gitabc", None),
    ],
)
def test_an_older_triton_is_no_backend(monkeypatch, version, reason):
    """Rather than one that fails when its first kernel is compiled."""
    monkeypatch.setattr(backend, "version", lambda: version)
    found = backend.backend.unavailable()
    assert found is None if reason is None else reason in found


def test_refusals():
    s, t = Case(60).logits()
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="it takes float32, bfloat16 and float16, not float64"):
            mk.fused_rkl_loss(s.double(), t)
        with pytest.raises(ValueError, match="stride"):
            mk.fused_rkl_loss(s.repeat(60, 1).t(), s.repeat(60, 1).t())
        with pytest.raises(ValueError, match="at most two strides"):
            mk.token_logprobs(torch.zeros(4, 6, 8, 60)[::2, ::2, ::2], torch.zeros(2, 3, 4, dtype=torch.int64))


VIEWS = {
    "cut-and-shifted": lambda x: x[:, 1:, 3:-7],
    "transposed-rows": lambda x: x.transpose(0, 1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_its_copy(view):
    """Of odd width, so that rows start on every column modulo 8; the teacher starts elsewhere than the student."""
    s, t = Case(1101, (2, 2), BF16, FP32).logits()
    s, t = VIEWS[view](s), VIEWS[view](t)
    with use_backend("triton"):
        expected = everything(s.contiguous(), t.contiguous())
        assert_same(everything(s, t.contiguous()), expected, 2**-8)
        assert_same(everything(s, t), expected, 2**-8)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_guard_bands(monkeypatch, dtype):
    """No kernel writes beside a buffer that a launcher makes, none uses what stands beside its inputs (NaN)."""
    made = []
    empty = torch.empty

    def guarded(*shape, dtype=torch.float32, device=None):
        shape = tuple(shape[0]) if not isinstance(shape[0], int) else shape
        n = torch.Size(shape).numel()
        whole = empty(n + 2 * GUARD, dtype=dtype).fill_(CANARY if dtype.is_floating_point else 1)
        made.append((whole, n))
        return whole[GUARD : GUARD + n].view(shape)

    s, t = Case(2101, (3,), dtype, FP32).logits()
    padded = [torch.full((5, x.shape[-1] + 2 * GUARD), torch.nan, dtype=x.dtype) for x in (s, t)]
    inside = [p[1:4, GUARD:-GUARD] for p in padded]
    for view, x in zip(inside, (s, t), strict=True):
        view.copy_(x)
    with use_backend("triton"):
        expected = everything(s, t, top_k=50, top_p=0.9)
        monkeypatch.setattr(torch, "empty", guarded)
        actual = everything(*inside, top_k=50, top_p=0.9)
        monkeypatch.undo()
    assert_same(actual, expected, 2**-8 if dtype == BF16 else 3e-6)
    assert len(made) > 10
    for whole, n in made:
        canary = CANARY if whole.dtype.is_floating_point else 1
        assert (whole[:GUARD] == canary).all() and (whole[GUARD + n :] == canary).all()


def test_in_place_writes_the_row_and_nothing_beside_it():
    base = torch.randn(3, 2101 + 2 * GUARD)
    before, t = base.clone(), torch.randn(3, 2101)
    logits = base[:, GUARD:-GUARD]
    with use_backend("triton"):
        expected = everything_grad(logits.clone(), t)
        mk.fused_rkl_loss(logits.requires_grad_(), t, inplace=True).backward()
    assert torch.equal(base[:, :GUARD], before[:, :GUARD]) and torch.equal(base[:, -GUARD:], before[:, -GUARD:])
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-5, atol=1e-9)


def everything_grad(s, t):
    return torch.autograd.grad(mk.fused_rkl_loss(s.requires_grad_(), t), s)[0]


def test_split_rows_are_whole_rows(monkeypatch):
    """Merged from 13 or more parts, or by one program: the same to rounding; twice the same bits."""
    s, t = Case(50257, (1,), BF16).logits()
    with use_backend("triton"):
        split, again = everything(s, t), everything(s, t)
        monkeypatch.setattr(launch, "PROGRAMS", 1)
        monkeypatch.setattr(launch, "EVEN_PROGRAMS", 1)
        whole = everything(s, t)
    assert all(torch.equal(a, b) for a, b in zip(split, again, strict=True))
    assert_same(split, whole)


@pytest.mark.parametrize("V", [517, 9001])
def test_a_second_visit_begins_where_the_first_one_ended(V):
    """That is in the cache of a GPU still. The interpreter runs programs in order: of rows in one place the one that
    is written last stays, the first. Several programs a row go backwards too, and cover it."""
    from minillm_kernels.backends.triton.divergence import row_divergence
    from minillm_kernels.backends.triton.grad import row_grad

    s, t = torch.randn(5, V), torch.randn(5, V)
    pair, ones = Pair(s, t, 1.0, V), torch.ones(5, 5)
    stats = reference.backend.row_stats(pair, None, None).float()
    right, place = row_grad(pair, None, stats, ones), torch.zeros(1, V)
    row_grad(pair, None, stats, ones, out=place.expand(5, V))
    assert torch.equal(place[0], right[0])
    mask = torch.arange(5) % 4 == 0
    values = row_divergence(pair, mask, stats, "jsd", 0.5)
    expected = reference.backend.row_divergence(pair, mask, stats, "jsd", 0.5)
    torch.testing.assert_close(values, expected.float(), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 20}, {"top_p": 0.8}, {"temperature": 0.0}])
def test_tokens_are_those_of_the_cpu_backend(options):
    if available_backends()["cpu"] != "ok":
        pytest.skip(available_backends()["cpu"])
    s, t = Case(4500, (8,), FP32, BF16).logits()
    uniforms = torch.rand(8, 2, dtype=torch.float64)
    drawn = {}
    for name in ("cpu", "triton"):
        with use_backend(name):
            drawn[name] = mk.mixed_sample(s, t, 0.4, uniforms=uniforms, **options)
    assert torch.equal(drawn["cpu"].token_ids, drawn["triton"].token_ids)
    assert torch.equal(drawn["cpu"].from_teacher, drawn["triton"].from_teacher)
    assert_same(drawn["triton"][1:4], drawn["cpu"][1:4])


def test_ties_at_a_cut_off_are_kept():
    z = torch.tensor([1.0, -0.0, 0.0, -0.0, -5.0]).expand(24, -1)
    grid = torch.stack([torch.zeros(24).double(), torch.arange(24).double() / 24], -1)
    with use_backend("triton"):
        for options, kept in (
            ({"top_k": 1}, {0}),
            ({"top_k": 2}, {0, 1, 2, 3}),
            ({"top_p": 0.4}, {0}),
            ({"top_p": 0.6}, {0, 1, 2, 3}),
        ):
            assert set(mk.mixed_sample(z, None, 0.0, uniforms=grid, **options).token_ids.tolist()) == kept


def test_tuning_takes_the_fastest_shape_for_rows_of_that_length(monkeypatch):
    """With a clock that prefers (2, 4): the table's line of long rows becomes that, the other stays; a search that
    fails leaves the table as it was."""
    lines = [(4096, 1, 4), (1 << 31, 2, 8)]
    monkeypatch.setitem(launch.TILES, launch.architecture(), lines)
    monkeypatch.setattr(tune, "CANDIDATES", [(1, 4), (2, 4)])

    def clock(run):
        run()
        return {(1, 4): 2.0, (2, 4): 1.0}[lines[1][1:]]

    times = tune.tune(5000, 2, torch.float32, "cpu", clock)
    assert times == {(1, 4): 2.0, (2, 4): 1.0} and lines == [(4096, 1, 4), (1 << 31, 2, 4)]

    def broken(run):
        raise RuntimeError("out of registers")

    with pytest.raises(RuntimeError, match="out of registers"):
        tune.tune(5000, 2, torch.float32, "cpu", broken)
    assert lines == [(4096, 1, 4), (1 << 31, 2, 4)]


@pytest.mark.parametrize("tokens", [4, 7, 8, 9])
@pytest.mark.parametrize("V", [1000, 1001, 1004])
def test_rows_are_aligned_alike_only_if_each_of_them_is(tokens, V):
    """Shifted logits beside rows without a gap: with 8 tokens of an odd width both have strides of 0 and 1 modulo 8
    once their dimensions are put together, and yet from the second sequence on the rows start elsewhere."""
    shifted, dense = torch.randn(2, tokens, V)[:, :-1], torch.randn(2, tokens - 1, V)
    for pair in ((shifted, dense), (shifted, shifted.clone()), (shifted, torch.randn(2, tokens, V)[:, 1:])):
        starts = [[x[i, j].data_ptr() // 4 % 4 for i in range(2) for j in range(tokens - 1)] for x in pair]
        assert launch.tiles_of(2 * (tokens - 1), V, *pair).aligned == (starts[0] == starts[1])
