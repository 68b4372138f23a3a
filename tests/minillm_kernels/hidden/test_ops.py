"""torch.ops.minillm.linear_* called directly: what does not fit is an error, before a kernel takes it on trust."""

import pytest
import torch

import minillm_kernels  # noqa: F401  (registers the operators)

OPS = torch.ops.minillm
N, H, V = 4, 8, 20
BOTH = {
    "student_hidden": torch.randn(N, H),
    "student_weight": torch.randn(V, H),
    "student_bias": None,
    "teacher_hidden": torch.randn(N, H + 3),  # widths of the models may differ
    "teacher_weight": torch.randn(V + 2, H + 3),  # and so may their heads
    "teacher_bias": None,
    "softcap": [0.0, 0.0],
    "scale": [1.0, 1.0],
    "temperature": 1.0,
    "vocab_size": V,
    "impl": "chunked",
    "chunk_rows": 3,
    "gather": False,
    "backend": "auto",
}
IDS, MASK, NEEDS = torch.tensor([0, 3, V - 1, 7]), torch.tensor([True, False, True, True]), [True, True, False]
OWN = {
    "linear_stats": {"token_ids": IDS, "mask": MASK},
    "linear_stats_grad": {
        "token_ids": IDS, "stats": torch.zeros(11, N), "coefficients": torch.ones(5, N), "needs": NEEDS,
    },
    "linear_stats_loss": {"token_ids": IDS, "mask": MASK, "coefficients": torch.ones(5, N) * MASK, "needs": NEEDS},
    "linear_divergence": {"mask": MASK, "divergence": "jsd", "beta": 0.5},
    "linear_divergence_loss": {
        "weights": torch.ones(N), "normalizer": None, "divisor": None, "reduction": "sum", "divergence": "jsd",
        "beta": 0.5, "needs": NEEDS,
    },
    "linear_minillm_loss": {
        "token_ids": IDS, "counts": MASK, "constants": torch.ones(4, N), "loss_scale": torch.tensor(1.0),
        "clip_range": 0.2, "entropy_coef": 0.0, "needs": NEEDS,
    },
}  # fmt: skip
WRONG = {
    "vocab_size": [0, -1, V + 1, 1 << 40],
    "temperature": [-1.0, 1e-39, float("nan")],
    "chunk_rows": [0, -3],
    "teacher_hidden": [torch.randn(3, H + 3), torch.randn(N + 1, H + 3)],
    "student_hidden": [torch.randn(2, 2, H), torch.randn(H)],
    "token_ids": [torch.zeros(3).long(), torch.zeros(N), torch.zeros(N, 1).long()],
    "mask": [torch.ones(3).bool(), torch.ones(N)],
    "counts": [torch.ones(3).bool(), torch.ones(N)],
    "stats": [torch.zeros(11, 3), torch.zeros(10, N)],
    "coefficients": [torch.zeros(5, 3), torch.zeros(4, N), torch.zeros(5, N, dtype=torch.bfloat16)],
    "constants": [torch.zeros(4, 3), torch.zeros(3, N)],
    "weights": [torch.ones(3), torch.ones(N, 2)],
    "divergence": ["kl", ""],
    "beta": [-0.1, 2.0, float("nan")],
}


def called(name, **other):
    return getattr(OPS, name)(**{**OWN[name], **BOTH, **other})


@pytest.mark.parametrize("name", OWN)
def test_what_does_not_fit_is_an_error(name):
    called(name)
    tried = 0
    for argument in {**OWN[name], **BOTH}.keys() & WRONG.keys():
        for value in WRONG[argument]:
            with pytest.raises((ValueError, TypeError, IndexError)):
                called(name, **{argument: value})
            tried += 1
    assert tried > 10


@pytest.mark.parametrize("name", OWN)
def test_forward_mode_is_refused(name):
    for argument in ("student_hidden", "student_weight", "teacher_hidden"):
        x = BOTH[argument]
        with pytest.raises(RuntimeError, match=f"{argument} carry a tangent, but minillm_kernels has no forward-mode"):
            torch.func.jvp(lambda y, key=argument: called(name, **{key: y}), (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("name", [name for name, own in OWN.items() if "needs" in own])
def test_no_two_outputs_are_one_tensor(name):
    """Operators may not return aliases of each other: torch.compile takes them for several."""
    outputs = called(name, needs=[False, False, False])
    assert len({id(x) for x in outputs}) == len(outputs) >= 3
