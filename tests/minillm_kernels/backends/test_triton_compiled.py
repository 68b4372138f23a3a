"""The Triton kernels as a GPU would get them, compiled ahead of time: resources, main loops, how many there are."""

import json
import os

import pytest
from processes import ROOT, in_a_process

from minillm_kernels import available_backends

if available_backends()["triton"] != "ok":
    pytest.skip(available_backends()["triton"], allow_module_level=True)


def compiled(code: str):
    """What code prints as JSON, in a process where Triton compiles."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # .ci/run puts another Triton there
    result = in_a_process(code, TRITON_INTERPRET="0", PYTHONPATH=path, timeout=420)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def kernels():
    """Every kernel for sm_80, sm_90 and sm_100, as `python -m benchmarks.gpu_static.triton_kernels` counts it."""
    return compiled(
        "import json\nfrom benchmarks.gpu_static.triton_kernels import static\nprint(json.dumps(static()))"
    )


def test_nothing_spills(kernels):
    assert {x["architecture"] for x in kernels} == {80, 90, 100} and len(kernels) == 3 * 30
    for x in kernels:
        assert x["spills"] == x["stack_bytes"] == x["local_bytes"] == 0, x


def test_budgets(kernels):
    """Row kernels: 256 threads of at most 128 registers, two programs a multiprocessor, 4 KiB of shared memory.
    Matmuls: one or two programs, within the 164 KiB of an A100."""
    for x in kernels:
        row = "linear" not in x["kernel"]
        assert x["registers"] <= (128 if row else 255), x
        assert x["shared_bytes"] <= (4 << 10 if row else 100 << 10), x


def test_main_loops_load_16_bytes(kernels):
    for x in kernels:
        if "linear" not in x["kernel"]:
            assert set(x["loads_by_bytes"]) == {"16"}, x


def test_matmuls_of_16_bit_types_are_on_the_tensor_cores(kernels):
    for x in kernels:
        if "linear" in x["kernel"]:
            assert (x["tensor_instructions"] > 0) == ("bf16" in x["kernel"]), x


def test_instructions_allow_nine_tenths_of_the_bandwidth(kernels):
    for x in kernels:
        assert x.get("headroom", 1.0) >= 0.9, x


def test_the_committed_counts_are_these(kernels):
    """Where the same Triton compiles them."""
    import triton

    committed = json.loads((ROOT / "benchmarks" / "results" / "gpu-static.json").read_text())
    if committed["triton_version"] != triton.__version__:
        pytest.skip(f"counted with Triton {committed['triton_version']}, here is {triton.__version__}")
    assert committed["triton"] == kernels


def test_each_row_moves_what_it_must():
    committed = json.loads((ROOT / "benchmarks" / "results" / "gpu-static.json").read_text())
    assert len(committed["triton_traffic"]) == 26
    for x in committed["triton_traffic"]:
        assert 1 <= x["of_minimum"] <= 1.01, x


SIZES = """
import json, torch
from benchmarks.gpu_static.recording import recording
from minillm_kernels.backends.triton import divergence, grad, linear, sample, stats
from minillm_kernels.hidden.operands import Projection
from minillm_kernels.rows import Pair
kernels = {}
with recording(90) as launches:
    for n, V in ((1, 4099), (2, 4099), (3, 50257), (16, 151936), (7, 4112)):
        s, r, ids = torch.zeros(n, V, dtype=torch.bfloat16), torch.zeros(11, n), torch.zeros(n, dtype=torch.int64)
        stats.row_stats(Pair(s, s, 0.1 * n, V), ids, None)
        grad.row_grad(Pair(s, s, 0.1 * n, V), None, r, torch.ones(5, n))
        divergence.row_divergence(Pair(s, s, 1.0, V), None, r, "jsd", 0.1 + 0.01 * n)
        divergence.row_divergence_grad(Pair(s, s, 1.0, V), r, r[:2], r[0], "jsd", 0.1 + 0.01 * n)
        sample.row_sample(Pair(s, s, 1.0, V), torch.rand(n, 2).double(), 0.01 * n, n, 0.9)
        hidden, weight = (torch.zeros(size, 64, dtype=torch.bfloat16) for size in (n, V))
        head = Projection(hidden, weight, None, 0.0, 1.0)
        linear.linear_stats(head, head, ids, None, 1.0, V)
for x in launches:
    kernels.setdefault(x.name, set()).add(id(x.kernel))
print(json.dumps({name: len(found) for name, found in kernels.items()}))
"""


def test_one_compilation_for_all_sizes():
    """Of rows, columns, temperature and beta: one row, odd numbers of them, a multiple of 16; odd and even widths."""
    found = compiled(SIZES)
    assert len(found) == 9 and set(found.values()) == {1}, found


VARIANTS = """
import json, torch
from benchmarks.gpu_static.recording import recording
from minillm_kernels.backends.triton import divergence, grad, linear, sample, scale, stats
from minillm_kernels.hidden.operands import Projection
from minillm_kernels.rows import Pair
n, V = 3, 4099
mask, ids, r = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64), torch.zeros(11, n)
with recording(90) as launches:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        s = torch.zeros(n, V, dtype=dtype)
        hidden, weight, bias = (torch.zeros(*size, dtype=dtype) for size in ((n, 64), (V, 64), (V,)))
        for t, given in ((s, ids), (s.float(), None), (None, ids)):
            pair, u = Pair(s, t, 1.0, V), torch.rand(n, 2).double()
            stats.row_stats(pair, given, mask if given is None else None)
            grad.row_grad(pair, given, r, torch.ones(5, n))
            grad.row_grad(pair, given, r, torch.ones(5, n), s, torch.ones(()))
            scale.row_scale(s, torch.ones(()))
            alpha = 0.0 if t is None else 0.4
            sample.row_sample(pair, u, alpha, 0, 1.0)
            sample.row_sample(pair._replace(temperature=0), u, alpha, 20, 0.9)
        for options in ((None, 0.0), (bias, 30.0)):
            student, teacher = (Projection(hidden, weight, options[0], options[1], scale) for scale in (1.0, 0.5))
            for other in (teacher, None) if dtype == torch.bfloat16 else (teacher,):
                linear.linear_stats(student, other, ids, mask, 1.0, V)
                tile = torch.zeros(n, 256, dtype=dtype)
                linear.linear_grad_tile(student, other, ids, r, torch.ones(5, n), 1.0, V, tile, 0)
    for kind in ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        pair = Pair(s.bfloat16(), s.bfloat16(), 1.0, V)
        divergence.row_divergence(pair, mask, r, kind, 0.3)
        divergence.row_divergence_grad(pair, r, r[:2], r[0], kind, 0.3)
print(json.dumps(sorted({x.name for x in launches})))
"""


def test_every_variant_compiles():
    """With and without a teacher, mask, tokens, filters, argmax, bias and soft-cap, in every type. `.ci/run` runs this
    with the oldest Triton as well: what it accepts is what differs between versions."""
    assert compiled(VARIANTS) == [
        *("argmax_kernel", "cutoff_kernel", "linear_grad_kernel", "linear_stats_kernel", "merge_parts_kernel"),
        *("pick_kernel", "row_divergence_grad_kernel", "row_divergence_kernel", "row_grad_kernel"),
        *("row_scale_kernel", "row_stats_kernel", "tile_mass_kernel"),
    ]
