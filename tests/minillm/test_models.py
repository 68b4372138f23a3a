import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

from minillm.config import ConfigError
from minillm.data import collate
from minillm.models import (
    Predictor,
    check_context,
    check_head,
    check_same_tokenizer,
    common_vocabulary,
    drop_layers,
    head,
    last_hidden,
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


@torch.no_grad()
def test_only_selected_positions_reach_the_head(make_llama):
    model = make_llama()
    batch = collate([[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]])
    reached = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, __: reached.append(inputs[0].shape[0]))
    logits = Predictor(model)(batch.input_ids, batch.attention_mask, batch.predict)
    handle.remove()
    assert reached == [6]
    for row, prompt, response, start in ((0, [1, 2, 3], [5, 6], 0), (1, [4], [7, 8, 9, 10], 2)):
        alone = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[start : start + len(response)], alone, rtol=1e-4, atol=1e-4, msg=str(row))


@torch.no_grad()
def test_head_of_hidden_is_the_model(make_llama, make_gpt2):
    ids = torch.tensor([[5, 6, 7]])
    for model in (make_llama(), make_gpt2()):
        found = head(model, last_hidden(model, ids, torch.ones_like(ids)))
        torch.testing.assert_close(found, model(ids).logits)


def test_a_model_that_changes_its_logits_after_the_head_is_refused(make_llama):
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=8.0, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="after the vocabulary head"):
        check_head(GraniteForCausalLM(config).eval(), "granite")
    with pytest.raises(ConfigError, match="no separate base model and vocabulary head"):
        check_head(make_llama().model, "a base model")


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


def test_the_common_vocabulary_is_the_smaller_head(make_llama):
    assert common_vocabulary(make_llama(vocab_size=300), make_llama(vocab_size=280)) == 280


def test_sequences_longer_than_the_positions_are_refused(make_gpt2):
    check_context(make_gpt2(), 128)
    with pytest.raises(ConfigError, match="may reach 129 tokens, but GPT2LMHeadModel has 128 positions"):
        check_context(make_gpt2(), 129)


def test_models_load_in_eval_mode(make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "bfloat16")
    assert isinstance(model, LlamaForCausalLM) and not model.training and model.dtype == torch.bfloat16
