"""hub_kernel/: the layout that kernel-builder takes, loaded as the `kernels` library loads a build: from any path,
under any name, twice in one process, beside the package."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import minillm_kernels

ROOT = Path(__file__).parents[1]
OPS = """import torch

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str):
    return f"{name}::{{op_name}}"
"""
"""What kernel-builder generates for each build."""


def module(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def prepare():
    kept = set(sys.modules)
    yield module(ROOT / "hub_kernel" / "prepare.py", "hub_kernel_prepare")
    for name in set(sys.modules) - kept:
        del sys.modules[name]


def test_two_builds_and_the_package_compute_the_same_in_one_process(prepare, tmp_path):
    kernels = [minillm_kernels]
    for name in ("minillm_kernels_1a2b", "minillm_kernels_3c4d"):
        package = prepare.prepare(tmp_path / name)
        (package / "_ops.py").write_text(OPS.format(name=name))
        kernels.append(module(package / "__init__.py", f"build_{name}"))
    generator = torch.Generator().manual_seed(0)
    states, theirs = torch.randn(2, 7, 8, generator=generator), torch.randn(2, 7, 8, generator=generator)
    head, their_head = torch.randn(50, 8, generator=generator), torch.randn(50, 8, generator=generator)
    for of in (
        lambda k, s: k.fused_linear_rkl_loss(s, head, theirs, their_head),
        lambda k, s: k.fused_rkl_loss(s @ head.T, theirs @ their_head.T),
        lambda k, s: k.fused_divergence_loss(s @ head.T, theirs @ their_head.T, "jsd", beta=0.3),
        lambda k, s: k.fused_linear_distill_stats(
            s, head, theirs, their_head, torch.zeros(2, 7, dtype=torch.long)
        ).reverse_kl.sum(),
    ):
        found = []
        for each in kernels:
            with each.use_backend("reference"):
                student = states.clone().requires_grad_()
                value = of(each, student)
                value.backward()
                found.append((value.detach(), student.grad))
        for one in found[1:]:
            torch.testing.assert_close(one, found[0], rtol=0, atol=0)
    uniforms = torch.rand(2, 7, 2, generator=generator, dtype=torch.float64)
    tokens = [k.mixed_sample(states @ head.T, theirs @ their_head.T, uniforms=uniforms).token_ids for k in kernels]
    assert tokens[0].equal(tokens[1]) and tokens[0].equal(tokens[2])
    assert len({id(getattr(torch.ops, name).row_stats) for name in ("minillm", "minillm_kernels_1a2b")}) == 2


def test_the_layout_is_what_kernel_builder_reads(prepare, tmp_path):
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    out = tmp_path / "out"
    prepare.prepare(out)
    general = tomllib.loads((out / "build.toml").read_text())["general"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (out / "torch-ext" / general["name"] / "__init__.py").is_file()
    assert general["license"] == project["license"] and isinstance(general["version"], int)
    assert not list(out.rglob("*.so")) and not list(out.rglob("*.pyc"))
    with pytest.raises(FileExistsError):
        prepare.prepare(out)


def test_a_new_way_of_naming_the_namespace_is_not_passed_over(prepare):
    with pytest.raises(ValueError, match=r"does not know this way .* namespace: name = 'minillm'"):
        prepare.in_its_own_namespace("import torch\nname = 'minillm'\n", ROOT / "minillm_kernels" / "x.py")
