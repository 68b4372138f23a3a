import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from minillm.config.schema import ConfigError
from minillm.model.check import check_context, check_same_tokenizer
from minillm.model.layers import drop_layers
from minillm.model.load import attention, load_model, load_tokenizer, unread_model


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


def test_sequences_longer_than_the_positions_are_refused(make_gpt2):
    check_context(make_gpt2(), 128)
    with pytest.raises(ConfigError, match="may reach 129 tokens, but GPT2LMHeadModel has 128 positions"):
        check_context(make_gpt2(), 129)


def test_code_that_comes_with_a_model_is_not_run(make_llama, make_tokenizer, tmp_path, monkeypatch):
    make_llama().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name, classes in (
        ("config.json", {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Tokenizer", None]}),
    ):
        tree = json.loads((tmp_path / name).read_text())
        tree |= {"auto_map": classes, "model_type": "unheard-of", "tokenizer_class": "Tokenizer"}
        (tmp_path / name).write_text(json.dumps(tree))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is asked, and it would not help
    for load in (load_model, load_tokenizer):
        with pytest.raises(ConfigError, match="could be loaded from"):
            load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_models_load_in_eval_mode(make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "bfloat16")
    assert isinstance(model, LlamaForCausalLM) and not model.training and model.dtype == torch.bfloat16


def test_attention_is_chosen_and_an_absent_one_is_refused(make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config._attn_implementation == "sdpa"  # no flash-attn without CUDA
    assert load_model(str(tmp_path), attn="eager").config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"flash_attention_2"):
        load_model(str(tmp_path), "bfloat16", "flash_attention_2")


def test_flash_attention_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert attention("auto", torch.bfloat16) == "flash_attention_2"
    assert attention("auto", torch.float32) is None  # it has no float32
    assert attention("sdpa", torch.bfloat16) == "sdpa"


def test_a_model_whose_files_hold_it_by_its_own_names_can_be_read_in_parts(files, tmp_path, make_llama):
    found = unread_model(str(files / "teacher"), "checkpoint", "auto")
    assert found is not None
    model, folder = found
    assert folder == files / "teacher" and all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.generation_config.eos_token_id == load_model(str(files / "teacher")).generation_config.eos_token_id
    make_llama(2, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tied = unread_model(str(tmp_path / "tied"), "checkpoint", "auto")
    assert tied is not None and tied[0].lm_head.weight is tied[0].model.embed_tokens.weight


def test_a_model_whose_files_hold_other_names_or_more_files_is_not_read_in_parts(files):
    weights = files / "teacher" / "model.safetensors"
    tensors = load_file(weights)
    save_file({f"old.{name}": value for name, value in tensors.items()}, weights, metadata={"format": "pt"})
    assert unread_model(str(files / "teacher"), "checkpoint", "auto") is None
    save_file(tensors, weights, metadata={"format": "pt"})
    save_file(tensors, files / "teacher" / "consolidated.safetensors", metadata={"format": "pt"})
    assert unread_model(str(files / "teacher"), "checkpoint", "auto") is None
