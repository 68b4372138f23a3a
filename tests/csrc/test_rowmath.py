"""csrc/rowmath and csrc/cpu/simd.h by themselves, compiled here: the merge's algebra, 2^x, log2 x, conversions."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minillm_kernels.rows import RowStats

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}


@pytest.fixture(scope="module", params=FLAGS)
def simd(request, tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to compile csrc/rowmath with")
    name = request.param
    if name != "baseline" and not _processor_has(name):
        pytest.skip(f"this processor has no {name}")
    library = tmp_path_factory.mktemp("rowmath") / f"{name}.so"
    command = [compiler, "-std=c++17", "-O3", "-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math"]
    command += [*FLAGS[name], f"-DMINILLM_ISA={name}", f"-I{CSRC}", "-shared", "-fPIC"]
    built = subprocess.run([*command, str(HERE / "rowmath.cpp"), "-o", str(library)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.key_of.argtypes, loaded.key_of.restype = [ctypes.c_float], ctypes.c_uint32
    loaded.of_key.argtypes, loaded.of_key.restype = [ctypes.c_uint32], ctypes.c_float
    loaded.mixture.argtypes, loaded.mixture.restype = [ctypes.c_double] * 3, ctypes.c_double
    return loaded


def _processor_has(name: str) -> bool:
    from minillm_kernels.backends import cpu

    if cpu.backend.unavailable():
        return False
    before = cpu.operations.instruction_set()
    has = cpu.operations.use_instruction_set(name)
    cpu.operations.use_instruction_set(before)
    return has


# ---- the merge ------------------------------------------------------------------------------------------------------


def state_of(s: torch.Tensor, t: torch.Tensor, T: float) -> torch.Tensor:
    """ms, mt, Zs, Zt, A, B, C of some columns by their definition."""
    if len(s) == 0:
        return torch.tensor([-math.inf, -math.inf, 0, 0, 0, 0, 0], dtype=torch.float64)
    ms, mt = s.max(), t.max()
    x, y = (s - ms) / T, (t - mt) / T
    sums = [x.exp(), y.exp(), x.exp() * (x - y), x.exp() * x, y.exp() * (y - x)]
    return torch.stack([ms, mt, *(v.sum() for v in sums)])


def merged(library, a: torch.Tensor, b: torch.Tensor, T: float) -> torch.Tensor:
    out = torch.empty(7, dtype=torch.float64)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (a, b))
    library.merge_states(*pointers, ctypes.c_double(1 / T), ctypes.c_void_p(out.data_ptr()))
    return out


def assert_states(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """To double rounding of the largest term: A, B and C are differences of terms up to (offset)/T."""
    assert torch.equal(actual[:2], expected[:2])
    torch.testing.assert_close(actual[2:], expected[2:], rtol=1e-11, atol=1e-11)


logits = st.floats(-30, 30, allow_nan=False, width=32)
offsets = st.sampled_from([0.0, 5.0, -40.0, 1000.0, -1e4])
columns = st.lists(st.tuples(logits, logits), max_size=6)
temperatures = st.sampled_from([0.3, 1.0, 2.0, 10.0])


@st.composite
def parts(draw, n: int):
    """n sets of columns, perhaps empty, each with its own offset in either model."""
    sets = []
    for _ in range(n):
        pairs = torch.tensor(draw(columns), dtype=torch.float64).reshape(-1, 2)
        sets.append((pairs[:, 0] + draw(offsets), pairs[:, 1] + draw(offsets)))
    return sets


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sets=parts(2), T=temperatures)
@example(sets=[(torch.zeros(0).double(),) * 2] * 2, T=1.0)
def test_merge_is_the_state_of_the_union(simd, sets, T):
    (s1, t1), (s2, t2) = sets
    a, b = state_of(s1, t1, T), state_of(s2, t2, T)
    assert_states(merged(simd, a, b, T), state_of(torch.cat([s1, s2]), torch.cat([t1, t2]), T))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sets=parts(3), T=temperatures)
def test_merge_is_associative_and_commutative(simd, sets, T):
    a, b, c = (state_of(s, t, T) for s, t in sets)

    def merge(x, y):
        return merged(simd, x, y, T)

    assert_states(merge(a, b), merge(b, a))
    assert_states(merge(merge(a, b), c), merge(a, merge(b, c)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sets=parts(1), T=temperatures)
def test_the_empty_state_is_the_identity(simd, sets, T):
    empty = torch.empty(7, dtype=torch.float64)
    simd.empty_state(ctypes.c_void_p(empty.data_ptr()))
    x = state_of(*sets[0], T)
    assert torch.equal(merged(simd, x, empty, T), x) and torch.equal(merged(simd, empty, x, T), x)


def finished(library, state: torch.Tensor, T: float) -> torch.Tensor:
    out = torch.empty(len(RowStats._fields), dtype=torch.float64)
    pointer = ctypes.c_void_p(state.data_ptr())
    library.finish_state(pointer, ctypes.c_double(1 / T), 1, ctypes.c_void_p(out.data_ptr()))
    return out


# All but the maxima and the log-probabilities of the token.
STATISTICS = [i for i, name in enumerate(RowStats._fields) if not name.endswith(("origin", "logprobs"))]


def test_a_state_of_nan_is_not_empty(simd):
    nan = torch.tensor([-math.inf, -math.inf, *[math.nan] * 5], dtype=torch.float64)
    x = state_of(torch.zeros(3).double(), torch.zeros(3).double(), 1.0)
    for r in (merged(simd, nan, x, 1.0), merged(simd, x, nan, 1.0)):
        assert finished(simd, r, 1.0)[STATISTICS].isnan().all()


def test_a_part_that_vanishes_adds_nothing(simd):
    """A tile of finfo.min beside ordinary ones: differences of 1e39 times weights of 0."""
    x, low = state_of(torch.randn(4).double(), torch.randn(4).double(), 1.0), torch.full((3,), -3.4e38).double()
    r = merged(simd, state_of(low, low, 1.0), x, 0.1)
    assert torch.equal(r, x)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sets=parts(1), T=temperatures)
def test_finish(simd, sets, T):
    """The statistics from the state, against log_softmax; NaN for an empty support."""
    s, t = sets[0]
    out = finished(simd, state_of(s, t, T), T)
    if len(s) == 0:
        assert out[STATISTICS].isnan().all()
        return
    lq, lp = (s / T).log_softmax(-1), (t / T).log_softmax(-1)
    q, p = lq.exp(), lp.exp()
    expected = {
        "reverse_kl": (q * (lq - lp)).sum(),
        "forward_kl": (p * (lp - lq)).sum(),
        "student_entropy": -(q * lq).sum(),
        "student_logsumexp": (s / T).logsumexp(-1),
        "teacher_logsumexp": (t / T).logsumexp(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(out[RowStats._fields.index(name)], value, rtol=1e-10, atol=1e-10)


# ---- the sampler's key and law --------------------------------------------------------------------------------------

ordered = st.floats(width=32, allow_nan=False)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(a=ordered, b=ordered)
@example(a=-0.0, b=0.0)
@example(a=math.inf, b=3.4028234663852886e38)
def test_ordered_key_is_monotone_and_invertible(simd, a, b):
    assert (a < b) <= (simd.key_of(a) < simd.key_of(b))
    back = simd.of_key(simd.key_of(a))
    assert back == a and math.copysign(1, back) == math.copysign(1, a)


log_probabilities = st.floats(-100, 0) | st.just(-math.inf)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(alpha=st.floats(1e-6, 1 - 1e-6) | st.sampled_from([0.0, 1.0]), lq=log_probabilities, lp=log_probabilities)
def test_mixture_logprob(simd, alpha, lq, lp):
    mass = alpha * math.exp(lp) + (1 - alpha) * math.exp(lq)
    expected = math.log(mass) if mass > 0 else -math.inf
    actual = simd.mixture(alpha, lq, lp)
    assert actual == expected or actual == pytest.approx(expected, rel=1e-12, abs=1e-12)


# ---- simd.h ---------------------------------------------------------------------------------------------------------


def applied(function, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """function on whole registers: the tail is padded."""
    padded = torch.nn.functional.pad(x, (0, -len(x) % 16))
    out = torch.empty(len(padded), dtype=dtype)
    function(ctypes.c_void_p(padded.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(len(padded)))
    return out[: len(x)]


def test_exp2(simd):
    """From the smallest normal number to 2^127 within 2 units in the last place; far below, exactly 0."""
    x = torch.cat([torch.linspace(-126, 127, 2_000_001), torch.arange(-126, 128) + 0.5, torch.arange(-126, 128.0)])
    x = x[x <= 127]
    relative = (applied(simd.exp2_of, x, torch.float32).double() / x.double().exp2() - 1).abs()
    assert relative.max() < 2 * 2**-23
    assert relative.mean() < 0.5 * 2**-23
    assert (
        applied(simd.exp2_of, torch.arange(-126.0, 127.0), torch.float32) == torch.arange(-126.0, 127.0).exp2()
    ).all()
    low = torch.cat([-torch.logspace(math.log10(151), 38, 1000), torch.tensor([-3.4028235e38])])
    assert (applied(simd.exp2_of, low, torch.float32) == 0).all()
    between = torch.linspace(-151, -126.001, 1000)  # denormals, or 0 where they cost time
    assert (applied(simd.exp2_of, between, torch.float32) <= 2.0**-126).all()


def test_exp2_of_nan(simd):
    bits = torch.tensor([0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0x7F800001, -1, -0x400000], dtype=torch.int32)
    assert applied(simd.exp2_of, bits.view(torch.float32), torch.float32).isnan().all()


def test_log2(simd):
    """Over all normal numbers: an absolute error of 2e-7 and a relative one of 2 units in the last place."""
    exponents = torch.randint(-126, 128, (1_000_000,)).float()
    x = torch.cat([(1 + torch.rand(1_000_000)) * exponents.exp2(), 1 + 0.5 * torch.randn(1_000_000)])
    x = x[(x >= 2.0**-126) & x.isfinite()]
    error = (applied(simd.log2_of, x, torch.float32).double() - x.double().log2()).abs()
    assert (error < 2e-7 + 2 * 2**-23 * x.double().log2().abs()).all()
    assert applied(simd.log2_of, torch.tensor([math.nan]), torch.float32).isnan().all()
    assert applied(simd.log2_of, torch.tensor([1.0]), torch.float32).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_is_exact_for_all_65536_values(simd, dtype):
    x = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    widened = applied(simd.from_bf16 if dtype == torch.bfloat16 else simd.from_fp16, x, torch.float32)
    nan = x.isnan()
    assert torch.equal(widened[~nan].view(torch.int32), x.float()[~nan].view(torch.int32))
    assert widened[nan].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_to_nearest_even(simd, dtype):
    """As torch does: numbers of every magnitude, every midpoint of two neighbours and the numbers beside it, overflow,
    denormals, zeros with their sign, infinities."""
    values = torch.arange(0, 32768).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()]
    middle = (values[1:].double() + values[:-1].double()).div(2).float()
    beside = [torch.nextafter(middle, torch.tensor(side)) for side in (math.inf, -math.inf)]
    anything = torch.randint(-(2**31), 2**31, (500_000,)).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, 65504.0, 65519.9, 65520.0, 65536.0, 3.3895e38, 3.4e38, math.inf, 2.0**-25, 2.0**-24])
    x = torch.cat([values, middle, *beside, anything[~anything.isnan()], special])
    x = torch.cat([x, -x])
    function = simd.to_bf16 if dtype == torch.bfloat16 else simd.to_fp16
    narrowed = applied(function, x, torch.int16)
    assert torch.equal(narrowed, x.to(dtype).view(torch.int16))
    assert applied(function, torch.tensor([math.nan, -math.nan]), torch.int16).view(dtype).isnan().all()
