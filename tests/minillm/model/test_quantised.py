"""Teachers and bases below adapters in 8 and 4 bits."""

import importlib.util

import pytest
import torch
from adapters import needs_adapters

from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.distillation import load_pair, run_recipe
from minillm.model import quantised
from minillm.model.adapters import stored_adapters
from minillm.model.cost import cost
from minillm.model.load import load_model
from minillm.model.quantised import held_bytes, plain_weight
from minillm.run.export import export
from minillm.train.preflight import prepare

IDS = torch.tensor([[3, 1, 4, 1, 5]])
LORA = ["--lora.rank=4", "--lora.alpha=8"]


def needs(*libraries):
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here")


def rounded(model):
    """The layers that are held in fewer bits, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight) is not torch.nn.Parameter
    }


@needs_adapters  # whose library makes plain matrices again
@pytest.mark.parametrize(
    ("bits", "apart"),
    [pytest.param("8bit", 0.01, marks=needs("torchao")), pytest.param("4bit", 0.2, marks=needs("bitsandbytes"))],
)
def test_a_quantised_teacher_computes_with_its_rounded_weights(files, bits, apart):
    recipe = load_recipe(files / "recipe.yaml", [f"--teacher.quantize={bits}"])
    student, teacher, tokenizer = load_pair(recipe.run)
    layers, plain = rounded(teacher.model), load_model(str(files / "teacher"))
    assert len(layers) == 4 * 7 and teacher.head.weight.dtype == torch.float32  # all but the head
    with torch.no_grad():
        for name, layer in layers.items():
            weight, exact = plain_weight(layer), plain.get_submodule(name).weight
            assert 0 < (weight - exact).abs().max() < apart * exact.abs().max()
            exact.copy_(weight)
        found, expected = teacher.model(IDS).logits, plain(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    prepare(recipe.run, recipe.stages["minillm"], student, teacher, tokenizer)


@needs("bitsandbytes")
def test_a_quantised_teacher_takes_less_memory_and_the_estimate_says_so(files, make_llama):
    make_llama(4, hidden_size=256, intermediate_size=512).save_pretrained(files / "teacher")
    recipes = [load_recipe(files / "recipe.yaml", [f"--teacher.quantize={bits}"]) for bits in ("", "4bit")]
    held = [cost(recipe.run, recipe.stages["minillm"]).held["teacher"] for recipe in recipes]
    teachers = [load_pair(recipe.run)[1].model for recipe in recipes]
    assert held[0] == sum(p.nbytes for p in teachers[0].parameters())
    scales = sum(
        x.numel() * x.element_size()
        for module in rounded(teachers[1]).values()
        for state in (module.weight.quant_state,)
        for x in (state.absmax, state.state2.absmax)
    )
    assert held[1] == pytest.approx(sum(p.nbytes for p in teachers[1].parameters()) + scales, rel=0.002)
    assert held[1] < held[0] / 3
    assert held_bytes(teachers[0], "") == held[0]


@needs_adapters
@needs("bitsandbytes")
def test_a_base_in_4_bits_below_adapters_is_trained_taught_and_exported(files):
    """QLoRA with its own base as the teacher: adapters in float32, one base, exports that compute what was trained."""
    flags = [*LORA, "--model.quantize=4bit", "--optim.lr=1e-2", "--lora.modules_to_save=lm_head"]
    recipe = load_recipe(
        files / "recipe.yaml", flags, overrides={"model": {"teacher": ""}, "teacher": {"source": "base"}}
    )
    student, teacher, _ = load_pair(recipe.run)
    base = {p.untyped_storage().data_ptr() for p in student.parameters()}
    assert all(p.untyped_storage().data_ptr() in base for p in teacher.parameters())
    assert len(rounded(teacher.model)) == 2 * 7
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}

    run = run_recipe(recipe, with_evaluation=False)
    exported, start = load_model(str(run.model_path)), load_model(str(files / "student"))
    assert not hasattr(exported.config, "quantization_config") and not rounded(exported)
    flags = [f"--model.student={run.model_path / 'adapter'}", "--model.quantize=4bit"]
    again = load_pair(load_recipe(files / "recipe.yaml", flags).run)[0].model  # trained further
    for name, layer in rounded(again).items():
        name, _, inner = name.rpartition(".")
        assert inner == "base_layer"
        weight = plain_weight(layer) + again.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(exported.get_submodule(name).weight, weight)
        assert (weight - plain_weight(layer)).abs().max() > 1e-3  # trained
    assert (exported.lm_head.weight - start.lm_head.weight).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, exported(IDS).logits, rtol=1e-3, atol=1e-3)


@needs_adapters
@needs("bitsandbytes")
@pytest.mark.filterwarnings("error:In CPU autocast")  # asked for the dtype of the packed weights
def test_adapters_above_a_base_in_4_bits_compute_in_the_dtype_of_the_rest(files):
    recipe = load_recipe(files / "recipe.yaml", [*LORA, "--model.quantize=4bit", "--model.compute_dtype=bfloat16"])
    student, teacher, tokenizer = load_pair(recipe.run)
    prepare(recipe.run, recipe.stages["minillm"], student, teacher, tokenizer)
    states = student.states(IDS, torch.ones_like(IDS))
    assert states.dtype == student.head.weight.dtype == torch.bfloat16


@needs_adapters
def test_adapters_alone_are_exported_where_they_are_asked_for(files):
    recipe = load_recipe(files / "recipe.yaml", [*LORA, "--lora.export=adapter", "--optim.lr=1e-2"])
    run = run_recipe(recipe, with_evaluation=False)
    assert not (run.model_path / "model.safetensors").exists() and not (run.model_path / "adapter").exists()
    assert sum(path.stat().st_size for path in run.model_path.glob("*.safetensors")) < 60_000
    from peft import PeftModel

    merged = load_model(str(run.model_path))
    theirs = PeftModel.from_pretrained(load_model(str(files / "student")), run.model_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-4)
    copied = export(run.path, None, files / "copied")
    assert copied == run.model_path and stored_adapters(files / "copied")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.quantize=4bit"], "set lora.rank to train adapters above them"),
        (["--teacher.quantize=2bit"], "unknown value of teacher.quantize"),
        (["--lora.export=adapter", "--model.drop_layers=[1,2]", "--model.student="], "have no base model"),
    ],
)
def test_settings_that_cannot_be(files, flags, message):
    with pytest.raises(ConfigError, match=message):
        load_pair(load_recipe(files / "recipe.yaml", flags).run)


def test_without_a_library_the_command_is_named(monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    for bits, named in (("8bit", "torchao"), ("4bit", "bitsandbytes")):
        with pytest.raises(ConfigError, match=rf"teacher.quantize {bits} needs {named}: pip install .minillm-kernels"):
            quantised.quantisation("teacher.quantize", bits, torch.float32)
