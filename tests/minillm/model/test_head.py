"""The seam between final states and vocabulary: what is read of a model's head gives the model's own logits."""

import pytest
import torch
from every_family import tiny
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from minillm.config.schema import ConfigError
from minillm.data.examples import collate
from minillm.model.head import CausalLM, Output, common_vocabulary, read_head
from minillm_kernels import fused_linear_distill_loss, fused_linear_divergence_loss, fused_linear_minillm_loss

SIZES = dict(
    vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, initializer_range=0.5, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
BATCH = collate([[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]])


def granite():
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval()


def gemma():
    torch.manual_seed(1)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0)).eval()


@torch.no_grad()
def test_only_selected_positions_reach_the_head(make_llama):
    lm = CausalLM(make_llama())
    output = lm.output(BATCH)
    assert output.states.shape == (6, 32)
    logits = lm.logits(output.states)
    for start, prompt, response in ((0, [1, 2, 3], [5, 6]), (2, [4], [7, 8, 9, 10])):
        alone = lm.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[start : start + len(response)], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("make", [granite, gemma])
def test_scales_and_soft_caps_are_those_of_the_model(make, head):
    lm = CausalLM(make(), head)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(lm.logits(lm.states(ids, torch.ones_like(ids))), lm.model(ids).logits)


def test_what_is_read():
    for model, softcap, scale in ((granite(), None, 0.125), (gemma(), 2.0, 1.0)):
        head = read_head(model)
        assert head.weight is model.lm_head.weight and (head.softcap, head.scale) == (softcap, scale)
    assert CausalLM(granite(), "logits").head.weight is None
    with torch.no_grad():  # a teacher's is a constant
        assert not CausalLM(granite()).head.weight.requires_grad


def test_a_head_that_cannot_be_read_is_refused_and_the_switch_is_named(make_llama):
    model = make_llama()
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    with pytest.raises(ConfigError, match=r"no separate base model and vocabulary head; set model.head to logits"):
        CausalLM(model)

    class Undivided(GraniteForCausalLM):
        """Does without the scale that its config names."""

        def forward(self, *args, **inputs):
            output = super().forward(*args, **inputs)
            output.logits = output.logits * self.config.logits_scaling
            return output

    unread = Undivided(granite().config).eval()
    with pytest.raises(ConfigError, match=r"something else in between; set model.head to logits"):
        CausalLM(unread)
    assert CausalLM(model, "logits").output(BATCH).states.shape == (6, 257)


def test_the_common_vocabulary_is_the_smaller_head(make_llama):
    pair = CausalLM(make_llama(vocab_size=300)), CausalLM(make_llama(vocab_size=280))
    assert common_vocabulary(*pair) == 280
    assert CausalLM(make_llama(vocab_size=300), "logits").vocab_size == 300


@pytest.mark.parametrize("loss", ["divergence", "minillm_loss", "cross_entropy", "distill_loss"])
def test_fused_losses_are_those_of_the_logits(loss):
    results = []
    for head in ("fused", "logits"):
        student, teacher = CausalLM(granite(), head), CausalLM(gemma(), head)
        with torch.no_grad():
            target = teacher.output(BATCH)

        def value(output: Output, batch, target=target):
            pair, ids, n = (*output, *target), batch.targets, len(batch.targets)
            if loss == "cross_entropy":
                return fused_linear_distill_loss(*output, token_ids=ids, student_logprobs=-1.0)._asdict()
            if loss == "distill_loss":
                return fused_linear_distill_loss(*pair, ids, forward_kl=0.4, student_logprobs=-0.6)._asdict()
            if loss == "divergence":
                return {"loss": fused_linear_divergence_loss(*pair, "jsd", beta=0.3, reduction="sum")}
            constants = {"advantages": torch.linspace(-1, 1, n), "old_logprobs": torch.full((n,), -5.0)}
            return fused_linear_minillm_loss(*pair, ids, **constants)._asdict()

        found = student(BATCH, value)["loss"]
        found.backward()
        results.append((found.detach(), [p.grad for p in student.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_a_model_that_sees_what_it_is_to_predict_is_refused():
    with pytest.raises(ConfigError, match=r"BertLMHeadModel lets a token see those that follow"):
        CausalLM(tiny("bert", is_decoder=False), "logits")
    CausalLM(tiny("bert"), "logits")


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_broken_weights_are_called_that(make_llama, head):
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="LlamaForCausalLM computes NaN: its weights are broken"):
        CausalLM(model, head)


@pytest.mark.parametrize(("head", "message"), [("fused", "be read before"), ("logits", "be run on token ids")])
def test_a_model_that_does_not_run_on_token_ids_is_refused(make_llama, head, message):
    model = make_llama()
    model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ConfigError, match=rf"LlamaForCausalLM cannot {message}.*division by zero"):
        CausalLM(model, head)
