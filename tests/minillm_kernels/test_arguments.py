"""Every error of a bad argument, from every function that takes it: what was wrong and what was expected."""

import inspect

import pytest
import torch

import minillm_kernels
from minillm_kernels import (
    distill_loss,
    distill_stats,
    fused_divergence_loss,
    fused_rkl_loss,
    minillm_loss,
    mixed_sample,
    token_logprobs,
)

S, T = torch.randn(2, 3, 60), torch.randn(2, 3, 60)
IDS, ZERO = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(())

PAIRS = {
    "fused_rkl_loss": lambda s, t, **k: fused_rkl_loss(s, t, **k),
    "fused_divergence_loss": lambda s, t, **k: fused_divergence_loss(s, t, "jsd", **k),
    "distill_stats": lambda s, t, **k: distill_stats(s, t, IDS, **k),
    "distill_loss": lambda s, t, **k: distill_loss(s, t, reverse_kl=1.0, **k),
    "minillm_loss": lambda s, t, **k: minillm_loss(s, t, IDS, advantages=ZERO, old_logprobs=ZERO, **k),
    "mixed_sample": lambda s, t, **k: mixed_sample(s, t, **k),
}
SINGLES = {
    "token_logprobs": lambda s, **k: token_logprobs(s, IDS, **k),
    "mixed_sample": lambda s, **k: mixed_sample(s, None, 0.0, **k),
}
each_pair = pytest.mark.parametrize("function", PAIRS.values(), ids=PAIRS)
each_single = pytest.mark.parametrize("function", SINGLES.values(), ids=SINGLES)


@each_pair
def test_pairs_of_logits(function):
    with pytest.raises(TypeError, match="student_logits must be a tensor, got ndarray"):
        function(S.numpy(), T)
    with pytest.raises(TypeError, match="teacher_logits must be a tensor, got list"):
        function(S, T.tolist())
    with pytest.raises(
        TypeError, match=r"student_logits must be float32, bfloat16, float16 or float64, got torch\.int64"
    ):
        function(S.long(), T)
    with pytest.raises(TypeError, match=r"teacher_logits must be float32.*got torch.float8_e4m3fn"):
        function(S, T.to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"student_logits must be \[..., V\] with V >= 1, got shape \(2, 3, 0\)"):
        function(S[..., :0], T)
    with pytest.raises(ValueError, match=r"teacher_logits must be \[..., V\] with V >= 1, got shape \(\)"):
        function(S, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"student_logits \(2, 3, 60\) and teacher_logits \(3, 2, 60\).*same leading"):
        function(S, T.reshape(3, 2, 60))
    with pytest.raises(ValueError, match=r"student_logits has stride 6 in its last dimension.*call .contiguous()"):
        function(torch.randn(60, 6).t().unflatten(0, (2, 3)), T)
    with pytest.raises(ValueError, match="teacher_logits has stride 0 in its last dimension"):
        function(S, torch.randn(2, 3, 1).expand(2, 3, 60))
    with pytest.raises(ValueError, match="student_logits are on cpu, teacher_logits on meta: move one of them"):
        function(S, T.to("meta"))


@each_single
def test_logits_of_one_model(function):
    with pytest.raises(TypeError, match="logits must be a tensor, got ndarray"):
        function(S.numpy())
    with pytest.raises(TypeError, match=r"logits must be float32, bfloat16, float16 or float64, got torch\.int32"):
        function(S.int())
    with pytest.raises(ValueError, match="has stride 2 in its last dimension"):
        function(torch.randn(2, 3, 120)[..., ::2])


@each_pair
@pytest.mark.parametrize("vocab_size", [0, -1, 59, 61])
def test_vocab_size_of_a_pair(function, vocab_size):
    with pytest.raises(ValueError, match=rf"vocab_size {vocab_size} must lie.*smaller head \(head sizes 60 and 58\)"):
        function(S, T[..., :58], vocab_size=vocab_size)


@each_single
@pytest.mark.parametrize("vocab_size", [0, -1, 61])
def test_vocab_size_of_one_model(function, vocab_size):
    with pytest.raises(ValueError, match=rf"vocab_size {vocab_size} must lie.*smaller head \(head sizes 60\)"):
        function(S, vocab_size=vocab_size)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature(temperature):
    for name, function in PAIRS.items():
        if name == "mixed_sample":
            if temperature != 0:
                with pytest.raises(ValueError, match=r"temperature must be a finite number >= 0 \(0 = argmax\), got"):
                    function(S, T, temperature=temperature)
        else:
            with pytest.raises(ValueError, match="temperature must be a finite number > 0, got"):
                function(S, T, temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be a finite number > 0, got"):
        token_logprobs(S, IDS, temperature=temperature)


@pytest.mark.parametrize("temperature", [5e-324, 1e-39, 9e-16, 2e37, 1e300])
def test_temperatures_whose_quotients_float32_does_not_hold(temperature):
    for function in PAIRS.values():
        with pytest.raises(ValueError, match=r"temperature must lie in \[1e-15, 1e\+37\], where float32 holds"):
            function(S, T, temperature=temperature)
    with pytest.raises(ValueError, match="temperature must lie in"):
        minillm_kernels.FusedRKLLoss(temperature=temperature)
    with pytest.raises(ValueError, match="temperature must lie in"):
        minillm_kernels.fused_linear_rkl_loss(S, S[0], S, S[0], temperature=temperature)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_unit_intervals(value):
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got"):
        fused_divergence_loss(S, T, "jsd", beta=value)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got"):
        mixed_sample(S, T, value)


PER_TOKEN = {
    "token_ids-logprobs": lambda ids: token_logprobs(S, ids),
    "token_ids-stats": lambda ids: distill_stats(S, T, ids),
    "token_ids-loss": lambda ids: distill_loss(S, T, ids, reverse_kl=1.0),
    "token_ids-minillm": lambda ids: minillm_loss(S, T, ids, advantages=ZERO, old_logprobs=ZERO),
    "labels": lambda ids: fused_rkl_loss(S, T, ids),
    "labels-divergence": lambda ids: fused_divergence_loss(S, T, "tvd", ids),
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_token_ids_and_labels(name):
    function, what = PER_TOKEN[name], name.split("-")[0]
    with pytest.raises(TypeError, match=f"{what} must be a tensor, got list"):
        function(IDS.tolist())
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=f"{what} must be integers, got {dtype}"):
            function(IDS.to(dtype))
    with pytest.raises(ValueError, match=rf"{what} must have shape \(2, 3\), got \(6,\)"):
        function(IDS.flatten())
    with pytest.raises(ValueError, match=f"{what} are on meta, the logits on cpu: move one of them"):
        function(IDS.to("meta"))


PER_ROW = {
    "weights": lambda x: fused_rkl_loss(S, T, weights=x),
    "forward_kl": lambda x: distill_loss(S, T, forward_kl=x),
    "advantages": lambda x: minillm_loss(S, T, IDS, advantages=x, old_logprobs=torch.zeros(())),
}


@pytest.mark.parametrize("name", PER_ROW)
def test_constants_of_each_row(name):
    function = PER_ROW[name]
    if name != "forward_kl":  # a number otherwise
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            function([1.0, 2.0])
    with pytest.raises(ValueError, match=rf"{name} must broadcast to the leading shape \(2, 3\), got \(2,\)"):
        function(torch.ones(2))
    with pytest.raises(ValueError, match=rf"{name} must broadcast to the leading shape \(2, 3\), got \(1, 2, 3\)"):
        function(torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match=f"{name} are on meta, the logits on cpu"):
        function(torch.ones(2, 3, device="meta"))
    with pytest.raises(ValueError, match=f"{name} require a gradient, but are constants here"):
        function(torch.ones(2, 3, requires_grad=True))


def test_names():
    with pytest.raises(
        ValueError, match="unknown divergence 'kl': expected one of reverse_kl, forward_kl, jsd, skew_f"
    ):
        fused_divergence_loss(S, T, "kl")
    with pytest.raises(ValueError, match="unknown reduction 'median': expected one of none, sum, mean, batchmean"):
        fused_rkl_loss(S, T, reduction="median")


def test_teacher_that_requires_grad():
    for name, function in PAIRS.items():
        if name != "mixed_sample":  # draws constants from constants
            with pytest.raises(
                ValueError, match="teacher_logits require a gradient, but the teacher is a constant here"
            ):
                function(S, T.clone().requires_grad_())


@pytest.mark.parametrize("name", [*PAIRS, *SINGLES, "fused_linear_token_logprobs"])
def test_forward_mode_is_refused(name):
    """A tangent would be dropped: the derivative would be 0 without a word."""
    weight = torch.randn(9, 60)
    functions = {
        **{key: lambda s, f=f: f(s, T) for key, f in PAIRS.items()},
        **SINGLES,
        "fused_linear_token_logprobs": lambda s: minillm_kernels.fused_linear_token_logprobs(s, weight, IDS),
    }
    function = functions[name]
    expected = {
        "expected_exception": RuntimeError,
        "match": "carry a tangent, but minillm_kernels has no forward-mode",
    }
    with pytest.raises(**expected):
        torch.func.jvp(function, (S,), (T,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(S, T)
        with pytest.raises(**expected), torch.no_grad():
            function(dual)
        function(S)
    if name in PAIRS:
        with pytest.raises(**expected):
            torch.func.jvp(lambda t: PAIRS[name](S, t), (T,), (S,))


NORMALIZED = {
    "fused_rkl_loss": lambda n: fused_rkl_loss(S, T, normalizer=n),
    "fused_divergence_loss": lambda n: fused_divergence_loss(S, T, "jsd", normalizer=n, reduction="mean"),
    "minillm_loss": lambda n: minillm_loss(S, T, IDS, advantages=ZERO, old_logprobs=ZERO, normalizer=n).loss,
    "fused_linear_rkl_loss": lambda n: minillm_kernels.fused_linear_rkl_loss(S, S[0], T, S[0], normalizer=n),
    "fused_linear_minillm_loss": lambda n: (
        minillm_kernels.fused_linear_minillm_loss(
            S, S[0], T, S[0], IDS, advantages=ZERO, old_logprobs=ZERO, normalizer=n
        ).loss
    ),
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_normalizer(name):
    function = NORMALIZED[name]
    for several in (torch.ones(2), torch.ones(2, 3), torch.ones(0)):
        with pytest.raises(ValueError, match="normalizer must be a number or a tensor of one element, got shape"):
            function(several)
    for number in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"normalizer must be a finite number >= 0, got {number}"):
            function(number)
    with pytest.raises(ValueError, match="normalizer requires a gradient, but is a constant here"):
        function(torch.ones(()).requires_grad_())
    five = function(5.0)
    for same in (5, torch.tensor(5), torch.tensor([5.0]), torch.tensor([[5.0]], dtype=torch.float64)):
        assert torch.equal(function(same), five) and five.shape == ()
    for nothing in (0, torch.tensor(0)):
        assert function(nothing) == 0


def test_tensors_of_zeros_without_memory():
    """Such as forward-mode differentiation makes: the operator is given one number for all of them."""
    zeros = torch._efficientzerotensor(3, 50)
    for function in (lambda: fused_rkl_loss(torch.randn(3, 50), zeros), lambda: mixed_sample(zeros, None, 0.0)):
        with pytest.raises(ValueError, match=r"logits have no memory of their own.*call .clone\(\)"):
            function()


GROUPED = {
    "fused_rkl_loss": (S, T),
    "fused_divergence_loss": (S, T, "jsd"),
    "token_logprobs": (S, IDS),
    "distill_stats": (S, T, IDS),
    "distill_loss": (S, T),
    "minillm_loss": (S, T, IDS),
    "mixed_sample": (S, T),
    "fused_linear_rkl_loss": (S, S[0], S, S[0]),
    "fused_linear_divergence_loss": (S, S[0], S, S[0], "jsd"),
    "fused_linear_token_logprobs": (S, S[0], IDS),
    "fused_linear_distill_stats": (S, S[0], S, S[0], IDS),
    "fused_linear_distill_loss": (S, S[0]),
    "fused_linear_minillm_loss": (S, S[0], S, S[0], IDS),
}


@pytest.mark.parametrize("name", GROUPED)
def test_group_is_a_process_group(name):
    constants = {"advantages": ZERO, "old_logprobs": ZERO} if "minillm" in name else {}
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group .*, got 'world'"):
        getattr(minillm_kernels, name)(*GROUPED[name], group="world", **constants)


def test_every_function_that_has_a_group_is_above():
    functions = [name for name in minillm_kernels.__all__ if inspect.isfunction(getattr(minillm_kernels, name))]
    grouped = [name for name in functions if "group" in inspect.signature(getattr(minillm_kernels, name)).parameters]
    assert sorted(grouped) == sorted(GROUPED)


def test_sampling_options():
    with pytest.raises(
        ValueError, match=r"alpha = 0\.2 samples from the teacher too: pass teacher_logits, or alpha=0"
    ):
        mixed_sample(S, None)
    for top_k in (-1, 2.5):
        with pytest.raises(ValueError, match=rf"top_k must be a whole number >= 0 \(0 = no limit\), got {top_k}"):
            mixed_sample(S, T, top_k=top_k)
    for top_p in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"top_p must lie in \(0, 1\] \(1 = no limit\), got {top_p}"):
            mixed_sample(S, T, top_p=top_p)
    with pytest.raises(ValueError, match=r"uniforms must be float64 of shape \(2, 3, 2\), got torch.float32 of shape"):
        mixed_sample(S, T, uniforms=torch.rand(2, 3, 2))
    with pytest.raises(
        ValueError, match=r"uniforms must be float64 of shape \(2, 3, 2\), got torch.float64 of shape \(6, 2"
    ):
        mixed_sample(S, T, uniforms=torch.rand(6, 2, dtype=torch.float64))
    with pytest.raises(TypeError, match="uniforms must be a tensor, got float"):
        mixed_sample(S, T, uniforms=0.5)
    with pytest.raises(ValueError, match="uniforms are on meta, the logits on cpu: move one of them"):
        mixed_sample(S, T, uniforms=torch.rand(2, 3, 2, dtype=torch.float64, device="meta"))


def test_rows_of_more_than_two_strides():
    """(4, 2, 3) rows of which no two dimensions merge: the compiled backend asks for a copy instead of making one."""
    base = torch.randn(8, 4, 5, 60)
    s = base[::2, ::2, :3]
    with pytest.raises(ValueError, match=r"at most two strides may describe the rows; call .contiguous\(\) first"):
        fused_rkl_loss(s, s)
