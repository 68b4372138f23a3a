"""Requests that fail and are sent again, and the weights that a server gets."""

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm_service import QUICK, answers

from minillm.config.schema import ConfigError, LoraConfig
from minillm.engine.rollout import drawn, engine_gap, read
from minillm.engine.vllm_server import Server
from minillm.engine.weights import weights_of
from minillm.lost import ServerLost
from minillm.model.adapters import add_adapters
from minillm.model.head import CausalLM


@pytest.mark.parametrize("tied", [False, True])
def test_a_server_is_given_the_weights_before_each_rollout(serve, make_llama, tied):
    student = CausalLM(make_llama(2, seed=1, tie_word_embeddings=tied))
    service = serve(CausalLM(make_llama(2, seed=9)))
    for _ in range(2):
        rollout = read(drawn(answers(student, service), student.device), student, None, 0.0)
        assert float(engine_gap(rollout)) < 1e-5
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    assert len(service.reloads) == 2 and service.version != "default"


def test_a_prefix_cache_of_other_weights_is_not_used(serve, student):
    service = serve(student)
    service.resets = [False, False, True]
    answers(student, service)
    assert service.resets == []
    service.resets = [False] * 3
    with pytest.raises(ServerLost, match="still in use"):
        answers(student, service)


def test_a_frozen_model_is_never_pushed(serve, teacher):
    service = serve(teacher)
    answers(teacher, service)
    assert service.reloads == [] and service.version == "default"


@pytest.mark.parametrize("trouble", ["cut", 500, 503, 429])
def test_requests_that_fail_for_a_while_are_sent_again(serve, teacher, trouble):
    service = serve(teacher)
    expected = answers(teacher, service)
    service.troubles = [trouble, trouble]
    again = answers(teacher, service)
    assert [each.token_ids for each in again] == [each.token_ids for each in expected]
    assert not service.troubles


def test_a_server_that_was_started_anew_gets_the_weights_again(serve, student, make_llama):
    service = serve(CausalLM(make_llama(2, seed=9)))
    expected = [each.token_ids for each in answers(student, service)]
    service.troubles = [None, None, None, "restart"]  # after the push, at the first completion
    assert [each.token_ids for each in answers(student, service)] == expected
    assert len(service.reloads) == 3 and service.version != "default"


def test_a_server_that_stays_away_is_given_up(serve, teacher):
    service = serve(teacher)
    answers(teacher, service)
    service.troubles = ["cut"] * 100
    with pytest.raises(ServerLost, match=r"does not answer .* in 3 attempts \(engine.retries, engine.timeout\)"):
        answers(teacher, service)
    assert len(service.troubles) >= 100 - 3 * 2
    service.troubles = []
    assert answers(teacher, service)  # a loss is no state: the next rollout may find it again


def test_what_a_server_refuses_is_not_sent_again(serve, teacher):
    service = serve(teacher)
    answers(teacher, service)
    service.troubles = [400]
    with pytest.raises(ServerLost, match=r"/v1/completions refuses a request \(400"):
        answers(teacher, service, prompts=[[5]])
    assert not service.troubles


def test_a_server_is_looked_for_at_once(serve, teacher, student):
    with pytest.raises(ConfigError, match=r"no vLLM server answers at http://127.0.0.1:9 .*engine.url"):
        Server("http://127.0.0.1:9", QUICK, None)
    with pytest.raises(ConfigError, match="sequences of 4 tokens, and prompt and answer may reach 8"):
        answers(teacher, serve(teacher, longest=4))


def test_weights_written_for_a_server_do_not_stay(serve, make_llama):
    lm = CausalLM(make_llama(2))
    service = serve(lm)
    answers(lm, service)
    (path,) = service.reloads
    assert Path(path).exists()
    del lm, service.lm
    gc.collect()
    assert not Path(path).parent.exists()


def test_adapters_are_merged_into_what_an_engine_gets(make_llama):
    pytest.importorskip("peft")
    base = make_llama(2)
    before, model = {k: v.clone() for k, v in base.state_dict().items()}, base
    add_adapters(model, LoraConfig(rank=2), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    found = weights_of(CausalLM(model), torch.float32)
    assert found.keys() == before.keys()
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


def test_weights_are_named_as_in_a_checkpoint(make_llama, tmp_path):
    model = make_llama(2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    stored, found = load_file(tmp_path / "model.safetensors"), weights_of(CausalLM(model), torch.bfloat16)
    assert found.keys() == stored.keys() | {"lm_head.weight"}  # tied, and packed apart by vLLM
    assert all(value.dtype == torch.bfloat16 for value in found.values())
