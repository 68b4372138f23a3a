"""The student's own weights as the teacher: what is shared, what stands still, what moves."""

import shutil

import pytest
import torch
from adapters import needs_adapters
from safetensors.torch import load_file

from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.data.examples import collate
from minillm.distillation import load_pair, run_recipe
from minillm.model.cost import cost
from minillm.model.head import CausalLM
from minillm.model.load import load_model, own_weights
from minillm.run.directory import RunDirectory
from minillm.train.loop import train
from minillm.train.preflight import prepare

IDS = torch.tensor([[3, 1, 4, 1, 5]])
LORA = ["--lora.rank=4", "--lora.alpha=8"]


def recipe_of(files, source, *flags, method="gkd"):
    tree = {"model": {"teacher": ""}, "teacher": {"source": source}, "stages": {"warm-up": {"method": method}}}
    tree["stages"]["minillm"] = {"method": "kd"}  # is left out
    recipe = load_recipe(files / "recipe.yaml", ["--rollout.max_new_tokens=6", *flags], overrides=tree)
    recipe.stages.pop("minillm")
    return recipe


def storages(*models):
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}


@needs_adapters
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("whole", ["", "lm_head"])
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_the_base_below_the_adapters_teaches_without_a_second_copy(files, dtype, whole, recompute):
    flags = [*LORA, f"--lora.modules_to_save={whole}", f"--model.compute_dtype={dtype}"]
    recipe = recipe_of(files, "base", f"--model.recompute={recompute}", *flags)
    student, teacher, tokenizer = load_pair(recipe.run)
    prepare(recipe.run, recipe.stages["warm-up"], student, teacher, tokenizer)
    assert storages(student, teacher) == storages(student)  # no tensor that the student does not hold
    plain = load_model(str(files / "student"), dtype)
    assert len(list(teacher.parameters())) == len(list(plain.parameters()))
    with torch.no_grad():
        expected = plain(IDS).logits
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        batch = collate([[3, 1]], [[4, 1, 5]])
        torch.testing.assert_close(teacher.model(IDS).logits, expected, rtol=0, atol=0)
        found = teacher.logits(teacher.output(batch).states)
        torch.testing.assert_close(found.float(), expected[0, 1:-1].float(), rtol=2e-2, atol=2e-2)
        moved = student.logits(student.output(batch).states)
        assert (moved.float() - found.float()).abs().max() > 0.1


@needs_adapters
def test_a_lora_student_whose_base_is_named_as_the_teacher_shares_it(files):
    def own(*flags):
        return own_weights(load_recipe(files / "recipe.yaml", [f"--model.teacher={files / 'student'}", *flags]).run)

    assert own(*LORA) == "base" and own() == "" and own(*LORA, "--teacher.dtype=bfloat16") == ""
    assert own_weights(load_recipe(files / "recipe.yaml", LORA).run) == ""  # another model


@needs_adapters
def test_distilling_from_the_shared_base_is_distilling_from_a_second_copy(files):
    trained = []
    for shared in (True, False):
        flags = [f"--model.teacher={files / 'student'}", f"--output={files / str(shared)}", *LORA]
        recipe = load_recipe(files / "recipe.yaml", flags)
        student, teacher, tokenizer = load_pair(recipe.run)
        if not shared:
            teacher = CausalLM(load_model(str(files / "student")).requires_grad_(False))
        context = prepare(recipe.run, recipe.stages["minillm"], student, teacher, tokenizer)
        with RunDirectory(recipe, "", "", student.model, 0) as directory:
            train(context, directory, "minillm")
        trained.append([p for p in student.parameters() if p.requires_grad])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@needs_adapters
@pytest.mark.parametrize("flags", [[], LORA], ids=["all weights", "adapters"])
def test_the_average_moves_by_its_formula_and_survives_an_interruption(files, flags):
    def run(name, resume=""):
        recipe = recipe_of(files, "ema", *flags, "--teacher.decay=0.5", "--log.checkpoint_every=1",
                           "--log.checkpoints_kept=9", "--optim.lr=1e-2", f"--output={files / name}")  # fmt: skip
        run_recipe(recipe, with_evaluation=False, resume=resume, doctor=False)
        return recipe, sorted((files / name / "checkpoints").glob("step-*"))

    recipe, saved = run("whole")
    student, teacher, _ = load_pair(recipe.run)
    own = sum(p.nbytes for p in student.parameters() if p.requires_grad)
    assert sum(storages(student, teacher).values()) == sum(storages(student).values()) + own  # and no base once more
    expected = {name: p.detach() for name, p in student.model.named_parameters() if p.requires_grad}
    for path in saved:
        (weights,) = (load_file(path / f"{name}.safetensors") for name in ("model", "adapter")
                      if (path / f"{name}.safetensors").exists())  # fmt: skip
        expected = {name: 0.5 * value + 0.5 * weights[name] for name, value in expected.items()}
        memory = load_file(path / "memory.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(memory[f"average.model.{name}"], value)
    (files / "again").mkdir()
    for path in ("config.yaml", "checkpoints/step-1", "claim"):
        copy_to(files / "whole" / path, files / "again" / path)
    _, again = run("again", resume=str(files / "again" / "checkpoints" / "step-1"))
    assert len(saved) == len(again) == 3
    for name, value in load_file(saved[-1] / "memory.safetensors").items():
        torch.testing.assert_close(load_file(again[-1] / "memory.safetensors")[name], value, rtol=0, atol=0)


def copy_to(source, target):
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        shutil.copy(source, target)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher.source=base"], "the student has no adapters below which it would stay"),
        (["--teacher.source=bass"], "did you mean 'base'"),
        (["--teacher.source=ema", "--model.teacher=x"], "the student's own weights, and model.teacher is x"),
        (["--teacher.source=ema", "--teacher.quantize=8bit"], "and teacher.quantize is 8bit"),
        (["--teacher.source=ema", "--stages.warm-up.method=seqkd"], "before the updates that move it"),
        (["--teacher.source=ema", "--teacher.decay=1"], r"teacher.decay is 1.0; it lies in \[0, 1\)"),
    ],
)
def test_teachers_that_cannot_be(files, flags, message):
    with pytest.raises(ConfigError, match=message):
        load_pair(recipe_of(files, "checkpoint", *flags).run)


@needs_adapters
def test_what_a_teacher_of_its_own_weights_holds_is_estimated(files):
    held = {}
    for source in ("base", "ema"):
        recipe = recipe_of(files, source, *LORA)
        found = cost(recipe.run, recipe.stages["warm-up"])
        held[source] = found.held["teacher"]
        assert found.work["score"] > 0
    student = load_pair(recipe_of(files, "base", *LORA).run)[0]
    assert held == {"base": 0, "ema": sum(p.nbytes for p in student.parameters() if p.requires_grad)}
