import dataclasses
from typing import get_type_hints

import pytest
import yaml

from minillm.config.recipe import load_recipe, nested, parse_flags, recipe_from, run_from, save, split, stage_from
from minillm.config.schema import ConfigError, RunConfig, StageConfig

VALID = {"model": {"teacher": "t", "student": "s"}, "data": {"train": "x.jsonl", "text": "x.txt"}}


def write(tmp_path, tree):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def with_keys(**sections):
    return {**VALID, **{name: {**VALID.get(name, {}), **keys} for name, keys in sections.items()}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optm": {"lr": 1}}, "unknown section or key 'optm'; did you mean 'optim'"),
        ({"optim": {"learnrate": 1}}, "unknown key in section `optim` 'learnrate'"),
        ({"optim": {"step": 1}}, "did you mean 'steps'"),
        ({"optim": 3}, "it is a section"),
        ({"optim": {"steps": "many"}}, "optim.steps is 'many'; expected int"),
        ({"optim": {"steps": 1.5}}, "expected int"),
        ({"optim": {"steps": True}}, "expected int"),
        ({"optim": {"lr": "fast"}}, "optim.lr is 'fast'; expected float"),
        ({"optim": {"betas": [0.9]}}, "expected a list of 2 values"),
        ({"objective": {"length_norm": 2}}, "expected bool"),
        ({"model": {"teacher": 3}}, "model.teacher is 3; expected str"),
        ({"data": {"chat_template_kwargs": 3}}, "data.chat_template_kwargs is 3; expected a mapping"),
    ],
)
def test_what_cannot_be_read_is_named(tree, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        recipe_from("r", with_keys(**tree) if all(isinstance(v, dict) for v in tree.values()) else tree)


def test_numbers_are_read_as_people_write_them():
    # YAML 1.1 reads 1e-5 as text, and every flag is text
    optim = stage_from({"optim": {"lr": "1e-5", "betas": "[0.8, 0.9]", "steps": "7"}}).optim
    assert (optim.lr, optim.betas, optim.steps) == (1e-5, (0.8, 0.9), 7)
    assert run_from({"model": {"drop_layers": [3, 5]}}).model.drop_layers == (3, 5)
    assert run_from({"model": {"drop_layers": None}}).model.drop_layers is None
    assert stage_from({"optim": {"lr": 1}}).optim.lr == 1.0
    assert [stage_from({"rollout": {"coins": coins}}).rollout.coins for coins in (4, "4", "row")] == [4, 4, "row"]


def test_a_limit_of_tokens_may_change_with_the_steps(tmp_path):
    """Of YAML, of a flag, and of the recipe that a run writes down."""
    pairs, tree = (
        ((0, 8), (5, 16), (9, 4)),
        with_keys(rollout={"max_new_tokens": [[0, 8], [5, 16], [9, 4]], "batch_size": 64}),
    )
    flag = parse_flags(["--rollout.max_new_tokens=[[0, 8], [5, 16], [9, 4]]", "--rollout.batch_size=64"])
    with pytest.raises(ConfigError, match="seqkd samples before the first: give one"):
        recipe_from("r", tree | {"method": "seqkd"})
    for recipe in (recipe_from("r", tree), recipe_from("r", VALID, flag)):
        save(recipe, tmp_path / "config.yaml")
        for each in (recipe, load_recipe(tmp_path / "config.yaml")):
            rollout = each.stages["minillm"].rollout
            assert rollout.max_new_tokens == pairs and rollout.longest == 16
            assert [rollout.limit(done) for done in (0, 4, 5, 8, 9, 99)] == [8, 8, 16, 16, 4, 4]
    rollout = stage_from({}).rollout
    assert rollout.limit(0) == rollout.limit(99) == rollout.longest == rollout.max_new_tokens


def test_a_mapping_is_read_from_yaml_and_flags(tmp_path):
    tree = with_keys(data={"chat_template_kwargs": {"enable_thinking": True, "effort": "low"}}) | {"method": "sft"}
    flags = ["--data.chat_template_kwargs.enable_thinking=false", "--data.chat_template_kwargs.depth=2"]
    recipe = recipe_from("r", tree, parse_flags(flags))
    expected = {"enable_thinking": False, "effort": "low", "depth": 2}
    assert recipe.run.data.chat_template_kwargs == expected
    save(recipe, tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml").run.data.chat_template_kwargs == expected
    whole = parse_flags(["--data.chat_template_kwargs={enable_thinking: false}"])
    assert run_from(split(whole)[0]).data.chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(ConfigError, match="cannot differ between stages"):
        recipe_from("r", VALID, {"stages": {"minillm": {"data": tree["data"]}}})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_recipe_in_any_unicode(tmp_path, encoding):
    path = tmp_path / "recipe.yaml"
    tree = with_keys(data={"train": "größe.jsonl"}) | {"method": "sft"}
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding=encoding)
    assert load_recipe(path).stages["sft"].data.train == "größe.jsonl"
    path.write_bytes("data: {train: größe.jsonl}".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_recipe(path)


@pytest.mark.parametrize("seed", [-1, 2**42 + 1, 1_700_000_000_000_000_000, 2**63, 2**64])
def test_seeds_have_a_range(seed):
    for path in ("seed", "eval.seed"):
        with pytest.raises(ConfigError, match=rf"{path} is {seed}; a seed lies in \[0, {2**42}\]"):
            run_from(nested({path: seed}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train_on": "first"}}, "unknown value of data.train_on: 'first'"),
        (
            {"data": {"chat_template_kwargs": {"tokenize": True}}},
            "data.chat_template_kwargs.tokenize is set by minillm",
        ),
        (
            {"data": {"prompt_template": "alpaca", "chat_template_kwargs": {"a": 1}}},
            "are for data.prompt_template chat",
        ),
        ({"rollout": {"temperature": 0.7}}, "rollout.temperature is 0.7; MiniLLM's importance weights need 1"),
        ({"rollout": {"top_k": 50}}, "rollout.top_k is 50"),
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p is 0.9"),
        ({"loss": {"temperature": 2.0}}, "loss.temperature is 2.0"),
        ({"rollout": {"alpha": 1.0}}, "rollout.alpha is 1"),
        ({"rollout": {"coins": 0}}, "rollout.coins is 0; give the number of groups"),
        ({"rollout": {"coins": "rows"}}, "rollout.coins is 'rows'; expected int or row"),
        ({"rollout": {"coins": None}}, "rollout.coins is None; expected int or row"),
        ({"rollout": {"chunk_size": -1}}, "rollout.chunk_size is -1"),
        ({"rollout": {"cuda_graphs": "maybe"}}, "rollout.cuda_graphs is 'maybe'; expected bool or auto"),
        ({"rollout": {"cuda_graphs": True, "engine": "vllm"}}, "cuda_graphs is true, which is for our own decoder"),
        ({"rollout": {"max_new_tokens": 0}}, "rollout.max_new_tokens is 0; it must be at least 1"),
        ({"rollout": {"max_new_tokens": "many"}}, "rollout.max_new_tokens is 'many'; expected int or a list"),
        ({"rollout": {"max_new_tokens": [8, 16]}}, r"rollout.max_new_tokens\[0\] is 8; expected a list of 2 values"),
        ({"rollout": {"max_new_tokens": [[0, "x"]]}}, "rollout.max_new_tokens.* is 'x'; expected int"),
        ({"rollout": {"max_new_tokens": []}}, r"rollout.max_new_tokens is \[\]; give a number, or pairs"),
        ({"rollout": {"max_new_tokens": [[1, 8]]}}, "the first for 0 steps"),
        ({"rollout": {"max_new_tokens": [[0, 8], [5, 8], [5, 9]]}}, "or pairs of the steps done"),
        ({"rollout": {"max_new_tokens": [[0, 8], [5, 0]]}}, "the limit of at least 1 token"),
        ({"rollout": {"overlap": 2}}, "rollout.overlap is 2; give 1 to sample one batch ahead, or 0"),
        ({"rollout": {"alpha": 1.5}}, r"lies in \[0, 1\]"),
        ({"rollout": {"batch_size": 10}, "optim": {"batch_size": 8}}, "not a multiple of optim.batch_size"),
        ({"data": {"text": ""}}, "data.text is empty"),
        ({"data": {"train": ""}}, "data.train is empty"),
        ({"model": {"student": ""}}, "no student"),
        ({"model": {"drop_layers": (1, 2)}}, "keep one of them"),
        ({"model": {"teacher": ""}}, "method minillm needs model.teacher"),
        ({"model": {"teacher": "", "student": "", "drop_layers": (1, 2)}}, "model.drop_layers needs model.teacher"),
        ({"optim": {"steps": 0}}, "must be at least 1"),
        ({"objective": {"variant": "papr"}}, "did you mean 'paper'"),
        ({"data": {"prompt_template": "{instruction}"}}, "or a text that contains {prompt}"),
    ],
)
def test_contradictions_are_refused(sections, message):
    base = {"rollout": {"batch_size": 64}}
    with pytest.raises(ConfigError, match=message):
        recipe_from("r", with_keys(**{**base, **sections}))


def test_filtered_sampling_is_refused_for_minillm_alone():
    recipe_from("r", {**with_keys(rollout={"top_p": 0.9}), "method": "kd"})


def test_precedence_defaults_recipe_stage_smoke_flags(tmp_path):
    tree = with_keys(rollout={"batch_size": 64}, optim={"steps": 10, "lr": 1.0, "warmup_steps": 1})
    tree["stages"] = {"a": {"method": "kd", "optim": {"lr": 2.0}}, "b": {"method": "kd"}}
    tree["smoke"] = {"optim": {"steps": 3}, "stages": {"a": {"optim": {"steps": 2}}}}
    path = write(tmp_path, tree)

    plain = load_recipe(path).stages
    assert [plain[s].optim.lr for s in "ab"] == [2.0, 1.0]
    assert [plain[s].optim.steps for s in "ab"] == [10, 10]
    smoke = load_recipe(path, smoke=True).stages
    assert [smoke[s].optim.steps for s in "ab"] == [2, 3]
    flagged = load_recipe(path, ["--optim.lr=9", "--stages.b.optim.steps=5"], smoke=True).stages
    assert [flagged[s].optim.lr for s in "ab"] == [9.0, 9.0]
    assert [flagged[s].optim.steps for s in "ab"] == [2, 5]
    assert plain["a"].optim.weight_decay == StageConfig().optim.weight_decay


def test_a_config_without_stages_is_a_recipe_of_one(tmp_path):
    recipe = load_recipe(write(tmp_path, {**VALID, "method": "kd"}))
    assert list(recipe.stages) == ["kd"]
    assert recipe.stages["kd"].method == "kd"


def test_a_saved_recipe_reads_back_the_same(tmp_path):
    tree = {**VALID, "stages": {"a": {"method": "kd"}, "b": {"method": "sft"}}}
    recipe = load_recipe(write(tmp_path, tree), ["--optim.lr=3e-4", "--model.student=", "--model.drop_layers=[2, 3]"])
    save(recipe, tmp_path / "config.yaml")
    again = load_recipe(tmp_path / "config.yaml")
    assert (again.run, again.stages) == (recipe.run, recipe.stages)
    assert again.digest() == recipe.digest()
    assert load_recipe(tmp_path / "config.yaml", ["--output=elsewhere"]).digest() == recipe.digest()
    assert load_recipe(tmp_path / "config.yaml", ["--optim.lr=1"]).digest() != recipe.digest()


@pytest.mark.parametrize("flag", ["--optim.lr", "optim.lr=3", "-x=1"])
def test_flags_have_one_form(flag):
    with pytest.raises(ConfigError, match=r"--section.key=value"):
        parse_flags([flag])


def test_files_that_are_not_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="expected sections"):
        load_recipe(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="has no `smoke:` section"):
        load_recipe(write(tmp_path, VALID), smoke=True)
    with pytest.raises(ConfigError, match=r"unknown stage 'warmup'; did you mean 'warm-up'"):
        load_recipe(
            write(tmp_path, {**VALID, "stages": {"warm-up": {"method": "kd"}}}), ["--stages.warmup.optim.lr=1"]
        )


@pytest.mark.parametrize(
    ("flag", "right"),
    [
        ("stages.a.model.dtype=bfloat16", "model.dtype"),
        ("stages.a.lora.rank=8", "lora.rank"),
        ("stages.a.eval.prompts=3", "eval.prompts"),
        ("stages.a.data.eval=x.jsonl", "data.eval"),
        ("stages.a.output=/elsewhere", "output"),
        ("stages.a.seed=3", "seed"),
    ],
)
def test_what_belongs_to_the_run_is_refused_in_a_stage(tmp_path, flag, right):
    path = write(tmp_path, {**VALID, "stages": {"a": {"method": "kd"}}})
    with pytest.raises(ConfigError, match=rf"cannot differ between stages: write {right} at the top .*\(--{right}="):
        load_recipe(path, [f"--{flag}"])
    inside = nested({flag.partition("=")[0]: flag.partition("=")[2]})
    with pytest.raises(ConfigError, match=rf"stages\.a\.{right} cannot differ"):
        recipe_from("r", {**VALID, **inside})


@pytest.mark.parametrize(
    ("tree", "right"),
    [
        ({"optim": {"alpha": 0.3}}, "rollout.alpha or lora.alpha"),
        ({"rollout": {"lr": 1.0}}, "optim.lr"),
        ({"model": {"rank": 4}}, "lora.rank"),
        ({"objective": {"packing": True}}, "data.packing"),
        ({"loss": {"prompt_template": "alpaca"}}, "data.prompt_template"),
        ({"drop_layers": [1, 2]}, "model.drop_layers"),
    ],
)
def test_a_key_in_the_wrong_section_is_an_error_that_names_the_right_one(tree, right):
    found = {part.strip() for part in right.split(" or ")}
    with pytest.raises(ConfigError, match="did you mean ") as raised:
        recipe_from("r", {**VALID, "method": "kd", **tree})
    named = str(raised.value).partition("did you mean ")[2].removesuffix("?")
    assert set(named.split(" or ")) == found


def test_the_section_data_is_shared_by_run_and_stage():
    run, stage = split({"data": {"eval": "e.jsonl", "train": "t.jsonl", "prompt_template": "alpaca"}, "seed": 3})
    assert run == {"data": {"eval": "e.jsonl", "prompt_template": "alpaca"}, "seed": 3}
    assert stage == {"data": {"train": "t.jsonl"}}


def floats(cls, path=""):
    """Dotted paths of all keys that hold numbers with a fraction."""
    for name, kind in get_type_hints(cls).items():
        where = f"{path}{name}"
        if dataclasses.is_dataclass(kind):
            yield from floats(kind, f"{where}.")
        elif kind is float or kind == tuple[float, float]:
            yield where


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "1e999", "nan"])
@pytest.mark.parametrize("path", [*floats(RunConfig), *floats(StageConfig)])
def test_numbers_that_are_not_finite_are_refused(path, number):
    value = f"[0.9, {number}]" if path == "optim.betas" else number
    with pytest.raises(ConfigError, match=rf"^{path} is .*(nan|inf).*; expected a finite number"):
        recipe_from("r", {**VALID, **nested({path: value})})


def test_nor_are_they_read_by_a_template():
    data = {**VALID["data"], "chat_template_kwargs": {"a": [{"b": [float("nan")]}]}}
    with pytest.raises(ConfigError, match=r"^data.chat_template_kwargs.a is .*; expected a finite number"):
        recipe_from("r", {**VALID, "data": data})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("optim.lr=-1", "optim.lr is -1.0; it must be at least 0"),
        ("optim.weight_decay=-0.1", "optim.weight_decay is -0.1; it must be at least 0"),
        ("optim.warmup_steps=-1", "optim.warmup_steps is -1; it must be at least 0"),
        ("optim.betas=[0.9, 1]", r"optim.betas is \[0.9, 1.0\]; both lie in \[0, 1\)"),
        ("optim.max_grad_norm=-1", "optim.max_grad_norm is -1.0; it must be above 0"),
    ],
)
def test_what_the_optimiser_cannot_be_given(flag, message):
    path, _, value = flag.partition("=")
    with pytest.raises(ConfigError, match=message):
        recipe_from("r", {**VALID, **nested({path: value})})
