"""YAML that is broken, hostile or absurd, in files and flags: one error that says where."""

import time

import pytest

from minillm.config.parse import SIZE, parse
from minillm.config.recipe import load_recipe, parse_flags, recipe_from, run_from
from minillm.config.schema import ConfigError

VALID = {"model": {"student": "s"}, "data": {"train": "x.jsonl"}, "method": "sft"}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{name}'] * 9)}]\n" for name, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "a: [", "a: !!x 1", "a: !!python/object/apply:os.system [true]", "*x", "a: &a {b: *a}", "&a [*a]", BOMB,
        "a: " + "[" * 9999, "".join(" " * i + "a:\n" for i in range(999)), "".join("[" for _ in range(60)) + "]" * 60,
        "a: 2020-13-45", "a: !!timestamp x", "a: !!int ''", "a: !!bool x", "a: " + "9" * 9999, "? [a]\n: 1", "<<: 3",
        "\tx: 1", "a: \0", "a: 1\x1b", b"a: \xe9", b"\xff\xfea\0b",
        f"[{'1, ' * SIZE}]",
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_told_at_once(text):
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"^r.yaml (is not valid YAML: |nests more than 50 levels)") as told:
        parse(text, "r.yaml")
    assert "\n" not in str(told.value) and len(str(told.value)) < 700
    assert time.process_time() - started < 20


def test_where_it_is_broken_is_told(tmp_path):
    (tmp_path / "r.yaml").write_text("optim:\n  lr: 1\nmodel: [\n")
    with pytest.raises(ConfigError, match=r"r.yaml is not valid YAML: .*line 4, column 1"):
        load_recipe(tmp_path / "r.yaml")


def test_aliases_are_for_recipes_too():
    assert parse("a: &x {lr: 1}\nb: *x\nc: {<<: *x, steps: 2}", "r.yaml")["c"] == {"lr": 1, "steps": 2}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--optim.lr=!!x", r"optim.lr = '!!x' is not valid YAML: could not determine a constructor"),
        ("--optim.lr=[", "optim.lr = .* is not valid YAML"),
        ("--optim.lr=2020-99-99", "optim.lr = .* is not valid YAML: month must be"),
        ("--optim.betas=" + "[" * 9999, "optim.betas = .* is not valid YAML: maximum recursion"),
        ("--optim.steps=" + "9" * 5000, "optim.steps = .* is not valid YAML: .*digits"),
        ("--optim.lr=1" + "0" * 400, "optim.lr is .*; expected float"),
        ("--data.chat_template_kwargs.a=!!x", "data.chat_template_kwargs.a = '!!x' is not valid YAML"),
        ("--data.chat_template_kwargs={a: [}", "data.chat_template_kwargs = .* is not valid YAML"),
        ("--model.student=a\0b", "model.student is .*; it holds a code that is no character"),
        ("--model.student=\udcff", "model.student is .*; it holds a code that is no character"),
        ("--optim" + ".a" * 5000 + "=1", "cannot read '--optim.a.a"),
        ("--objective.variant=[a]", "unknown value of objective.variant: '.a.'"),
        ("--method=x", "unknown value of method: 'x'"),
    ],
)  # fmt: skip
def test_a_flag_that_is_no_value_is_named(flag, message):
    with pytest.raises(ConfigError, match=message) as told:
        recipe_from("r", VALID, parse_flags([flag]))
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"objective": {"variant": 3}}, "unknown value of objective.variant: '3'"),
        ({"objective": {"variant": {"a": 1}}}, "unknown value of objective.variant"),
        ({"method": ["sft"]}, "unknown value of method"),
        ({"method": {"a": 1}}, "unknown value of method"),
        ({"stages": 3}, "`stages` is 3; expected the stages by name"),
        ({"stages": ["a", "b"]}, "`stages` is .*; expected the stages by name"),
        ({"stages": {"a": [1]}}, "`stages.a` is .1.; it holds sections"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_named(tree, message):
    with pytest.raises(ConfigError, match=message):
        recipe_from("r", {**VALID, **tree})


@pytest.mark.parametrize("flags", [["--optim=1", "--optim.lr=2"], ["--optim.lr=2", "--optim=1"]])
def test_a_section_is_not_given_twice(flags):
    with pytest.raises(ConfigError, match="`optim` is '1'"):
        recipe_from("r", VALID, parse_flags(flags))
    with pytest.raises(ConfigError, match="`model` is 'T', and keys below it are given as well"):
        recipe_from("r", {**VALID, "model": "T"}, parse_flags(["--model.student=s"]))


@pytest.mark.parametrize(
    "name",
    ["../../escaped", "/tmp/x", "..", ".", "", "a b", "a/b", "a\\b", "a.b", "é", "a\n", "\x1b[2J", "a" * 101, 1, None,
     True, ("a", "b")],
)  # fmt: skip
def test_a_stage_is_named_by_letters_digits_and_dashes(name):
    with pytest.raises(ConfigError, match=r"a stage is called .*: give letters, digits, - and _ alone"):
        recipe_from("r", {**VALID, "stages": {name: {}}})


def test_names_of_stages_that_can_be():
    for name in ("warm-up", "minillm_2", "A", "3", "a" * 100):
        assert list(recipe_from("r", {**VALID, "stages": {name: {}}}).stages) == [name]
    assert list(recipe_from("r", VALID).stages) == ["sft"]


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ConfigError) as told:
        run_from({"model": {"head": ["x" * 10**6]}})
    assert len(str(told.value)) < 300
