"""Low-rank adapters: added, trained above a base of 16 bits, merged, saved, and trained further."""

import json
import sys

import pytest
import torch
from adapters import needs_adapters
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError, LoraConfig
from minillm.distillation import load_pair, run_recipe
from minillm.model.adapters import (
    add_adapters,
    continue_adapters,
    keep_base_in,
    merge_adapters,
    save_adapters,
    stored_adapters,
)
from minillm.model.head import CausalLM
from minillm.model.layers import drop_layers
from minillm.model.load import load_model, load_tokenizer
from minillm.run.export import write_model
from minillm.train.preflight import prepare

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def adapted(make_llama, **settings):
    model = make_llama()
    add_adapters(model, LoraConfig(**{"rank": 4, "alpha": 8, **settings}), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero until trained
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@needs_adapters
@torch.no_grad()
def test_merged_adapters_give_the_same_logits_and_plain_files(make_llama, tmp_path):
    model, plain = adapted(make_llama), make_llama()
    ids = torch.tensor([[3, 1, 4]])
    merged = merge_adapters(model)
    assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-2)
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load_model(str(tmp_path / "merged"))(ids).logits, merged(ids).logits)
    save_adapters(model, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    from peft import PeftModel

    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    plain = make_llama()
    assert merge_adapters(plain) is plain


@needs_adapters
def test_adapters_alone_are_trained_and_reach_the_fused_losses(make_llama):
    model = adapted(make_llama, targets="q_proj, v_proj")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    lm = CausalLM(model)
    ids = torch.tensor([[3, 1, 4]])
    torch.testing.assert_close(lm.logits(lm.states(ids, torch.ones_like(ids))), model(ids).logits)


@needs_adapters
def test_adapters_that_cannot_be(make_llama):
    with pytest.raises(ConfigError, match=r"lora.targets lm_head reaches the embeddings or the head"):
        adapted(make_llama, targets="lm_head")
    with pytest.raises(ConfigError, match=r"lora.targets nowhere .*Target modules .* Name other modules"):
        adapted(make_llama, targets="nowhere")


def test_without_peft_the_command_is_named(make_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'lora.rank needs peft: pip install "minillm-kernels\[lora\]"'):
        add_adapters(make_llama(), LoraConfig(rank=4), seed=0)


def test_a_peft_too_old_is_named_with_a_command_that_can_succeed(make_llama, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(peft, "__version__", "0.1")
    with pytest.raises(ConfigError, match=r'needs peft 0.18 or later, not 0\.1: pip install --upgrade "peft>=0.18"'):
        add_adapters(make_llama(), LoraConfig(rank=4), seed=0)


@needs_adapters
@torch.no_grad()
@pytest.mark.parametrize("export", ["merged", "adapter"])
@pytest.mark.parametrize(
    ("tied", "whole"), [(False, ""), (False, "lm_head"), (False, "lm_head,norm"), (True, ""), (True, "norm")]
)
def test_every_export_is_the_student(make_llama, tokenizer, tmp_path, tied, whole, export):
    """For us and for peft, which both read it merged or as adapters, and for training that goes on from it."""
    from peft import PeftModel

    make_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    add_adapters(model, LoraConfig(rank=4, alpha=8, modules_to_save=whole), seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained) == ("lm_head" in whole)
    for parameter in trained.values():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = model(IDS).logits
    lm = CausalLM(model)
    torch.testing.assert_close(lm.logits(lm.states(IDS, torch.ones_like(IDS))), expected)
    write_model(model, tokenizer, tmp_path / "out", export)
    adapter = str(tmp_path / ("out/adapter" if export == "merged" else "out"))
    found = {"adapters, merged by us": load_model(adapter)}
    found["adapters, by peft"] = PeftModel.from_pretrained(load_model(str(tmp_path / "base")), adapter)
    found["adapters, to go on with"] = load_model(str(tmp_path / "base"))
    continue_adapters(found["adapters, to go on with"], stored_adapters(adapter))
    again = {n for n, p in found["adapters, to go on with"].named_parameters() if p.requires_grad}
    assert again == trained.keys()
    if export == "merged":
        found["merged"] = load_model(str(tmp_path / "out"))
        assert found["merged"].state_dict().keys() == make_llama().state_dict().keys()
        assert (found["merged"].lm_head.weight is found["merged"].model.embed_tokens.weight) == tied
    for way, each in found.items():
        torch.testing.assert_close(each(IDS).logits, expected, rtol=1e-4, atol=1e-4, msg=way)


@needs_adapters
@torch.no_grad()
def test_tied_heads_are_not_trained_whole(make_llama, tmp_path):
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    for whole in ("lm_head", "embed_tokens"):
        with pytest.raises(ConfigError, match=r"embeddings or head, which are one tensor .* lora.modules_to_save"):
            add_adapters(load_model(str(tmp_path / "base")), LoraConfig(rank=4, modules_to_save=whole), seed=0)


class WeightCasts(TorchDispatchMode):
    """Counts the casts of whole matrices to another dtype."""

    def __init__(self, smallest):
        super().__init__()
        self.smallest, self.casts = smallest, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].numel() >= self.smallest:
            self.casts += 1
        return func(*args, **(kwargs or {}))


@needs_adapters
@pytest.mark.parametrize("whole", ["", "lm_head"])
def test_the_frozen_base_is_in_the_compute_dtype_and_not_cast_token_by_token(files, whole):
    flags = ["--lora.rank=2", f"--lora.modules_to_save={whole}", "--model.compute_dtype=bfloat16"]
    recipe = load_recipe(files / "recipe.yaml", flags)
    student, teacher, tokenizer = load_pair(recipe.run)
    context = prepare(recipe.run, recipe.stages["minillm"], student, teacher, tokenizer)
    for parameter in student.model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    ids = torch.tensor([[7]])
    with context.autocast(), torch.no_grad(), WeightCasts(student.model.config.hidden_size**2) as counted:
        for _ in range(2):
            student.logits(student.states(ids, None))
    assert counted.casts <= (1 if whole else 0)  # a head that is trained is cast once per context
    with torch.no_grad():  # as an evaluation does
        assert student.logits(student.states(ids, None)).isfinite().all()


def test_the_head_of_a_student_is_cast_once_not_token_by_token(files):
    recipe = load_recipe(files / "recipe.yaml", ["--model.compute_dtype=bfloat16"])
    student, teacher, tokenizer = load_pair(recipe.run)
    context = prepare(recipe.run, recipe.stages["minillm"], student, teacher, tokenizer)
    weight = student.head.weight
    with context.autocast(), torch.no_grad():
        student.logits(student.states(torch.tensor([[7]]), None))
        with WeightCasts(weight.numel()) as counted:
            student.logits(student.states(torch.tensor([[7]]), None))
    assert counted.casts == 0


@needs_adapters
@torch.no_grad()
def test_small_adapters_on_a_base_of_16_bits_are_merged_in_float32(make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    add_adapters(model, LoraConfig(rank=4, alpha=8), seed=0)
    keep_base_in(model, torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.fill_(1e-4)
    product = layer.get_delta_weight("default")
    found = merge_adapters(model).model.layers[0].self_attn.q_proj.weight
    assert found.dtype == torch.float32  # as the model's configuration says
    torch.testing.assert_close(found - layer.base_layer.weight.float(), product, rtol=1e-2, atol=1e-8)


# ---- directories of adapters


def distil(files, name, **settings):
    flags = [f"--{key.replace('__', '.')}={value}" for key, value in settings.items()]
    recipe = load_recipe(files / "recipe.yaml", [f"--output={files / name}", "--optim.lr=1e-2", *flags])
    recipe.stages.pop("minillm")
    return run_recipe(recipe, with_evaluation=False).model_path


@needs_adapters
def test_a_directory_of_adapters_is_trained_further(files, make_llama):
    first = distil(files, "first", lora__rank=4, lora__alpha=8) / "adapter"
    expected = load_model(str(first.parent))(IDS).logits
    torch.testing.assert_close(load_model(str(first))(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(str(first)).eos_token == "<eos>"  # the base model's
    recipe = load_recipe(files / "recipe.yaml", [f"--model.student={first}"])
    student = load_pair(recipe.run)[0].model
    torch.testing.assert_close(student(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert all("lora_" in name for name, p in student.named_parameters() if p.requires_grad)
    second = distil(files, "second", model__student=first)
    told = json.loads((second / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(files / "student") and (told["r"], told["lora_alpha"]) == (4, 8)
    assert (load_model(str(second))(IDS).logits - expected).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"lora.rank is 8 and lora.alpha 32; the adapters in .* have 4 and 8: leave"):
        load_pair(load_recipe(files / "recipe.yaml", [f"--model.student={first}", "--lora.rank=8"]).run)


@needs_adapters
def test_directories_of_adapters_that_cannot_be_used(files, make_llama, tmp_path):
    path = distil(files, "first", lora__rank=4) / "adapter"
    told = json.loads((path / "adapter_config.json").read_text())
    make_llama(1).save_pretrained(tmp_path / "other")
    for changed, message in (
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": str(tmp_path / "other")}, "do not fit .*other"),
        ({"peft_type": "IA3"}, "only LORA can be used here"),
    ):
        (path / "adapter_config.json").write_text(json.dumps(told | changed))
        with pytest.raises(ConfigError, match=message):
            load_model(str(path))
    (path / "adapter_config.json").write_text(json.dumps(told))
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="adapters are read from safetensors only"):
        load_model(str(path))


@needs_adapters
def test_adapters_of_a_cut_student_do_not_name_its_teacher(make_llama, tmp_path):
    make_llama(4).save_pretrained(tmp_path / "teacher")
    student = drop_layers(load_model(str(tmp_path / "teacher")), 1, 3)
    add_adapters(student, LoraConfig(rank=2), seed=0)
    save_adapters(student, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"names no base model .* cut from its teacher"):
        load_model(str(tmp_path / "adapter"))
