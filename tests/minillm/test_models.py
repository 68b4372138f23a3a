import pytest
import torch
from transformers import LlamaForCausalLM

from minillm.config import ConfigError
from minillm.models import (
    check_context,
    check_same_tokenizer,
    drop_layers,
    load_model,
    load_tokenizer,
)


@torch.no_grad()
def test_a_cut_student_is_the_teacher_without_its_block(make_llama):
    teacher = make_llama(5)
    student = drop_layers(teacher, 1, 3)
    ids = torch.randint(257, (2, 7))
    kept = [teacher.model.layers[i] for i in (0, 3, 4)]
    teacher.model.layers = torch.nn.ModuleList(kept)
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    teacher.config.num_hidden_layers = 3
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits)
    assert student.config.num_hidden_layers == 3


def test_a_cut_student_shares_no_memory_and_reloads(make_gpt2, make_llama, tmp_path):
    for teacher in (make_gpt2(), make_llama(3, tie_word_embeddings=True)):
        student = drop_layers(teacher, 0, 1)
        pointers = {p.data_ptr() for p in teacher.parameters()}
        assert not pointers & {p.data_ptr() for p in student.parameters()}
        student.save_pretrained(tmp_path / teacher.config.model_type)
        again = load_model(str(tmp_path / teacher.config.model_type))
        ids = torch.tensor([[3, 1, 4]])
        torch.testing.assert_close(again(ids).logits, student(ids).logits)


@pytest.mark.parametrize("block", [(2, 2), (3, 2), (-1, 2), (2, 5), (0, 4)])
def test_a_block_that_is_not_there(make_llama, block):
    with pytest.raises(ConfigError, match=r"the teacher has layers \[0, 4\)"):
        drop_layers(make_llama(4), *block)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no causal language model could be loaded from"):
        load_model(str(tmp_path))
    with pytest.raises(ConfigError, match="no tokenizer could be loaded from"):
        load_tokenizer(str(tmp_path))


def test_tokenizers_must_agree(make_tokenizer):
    ours = make_tokenizer()
    check_same_tokenizer(ours, make_tokenizer())
    with pytest.raises(ConfigError, match=r"1 tokens differ \(257 against 258 entries\), such as '<more>'"):
        check_same_tokenizer(ours, make_tokenizer(extra="<more>"))
    with pytest.raises(ConfigError, match=r"tokens differ.*cut one from it with model.drop_layers"):
        check_same_tokenizer(ours, make_tokenizer(reverse=True))
    other = make_tokenizer()
    other.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    with pytest.raises(ConfigError, match="one text gives"):
        check_same_tokenizer(ours, other)
    other = make_tokenizer()
    other.eos_token = "!"
    with pytest.raises(ConfigError, match="the end-of-sequence tokens are '<eos>' and '!'"):
        check_same_tokenizer(ours, other)


def test_sequences_longer_than_the_positions_are_refused(make_gpt2):
    check_context(make_gpt2(), 128)
    with pytest.raises(ConfigError, match="may reach 129 tokens, but GPT2LMHeadModel has 128 positions"):
        check_context(make_gpt2(), 129)


def test_models_load_in_eval_mode(make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "bfloat16")
    assert isinstance(model, LlamaForCausalLM) and not model.training and model.dtype == torch.bfloat16
