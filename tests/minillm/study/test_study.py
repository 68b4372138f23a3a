"""The committed study, one cell of each kind, on tiny models and data."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import minillm
from minillm.cli import main
from minillm.config.recipe import merge
from minillm.config.schema import ConfigError
from minillm.study import cell, document
from minillm.study.cell import rounded, steps_to_reach
from minillm.study.plan import Cell, load_study

RECIPE = Path(__file__).parents[3] / "recipes/study/study.yaml"


@pytest.fixture
def tree(files):
    """The committed study, its smoke sizes, and nothing of it but models and data replaced."""
    tree = yaml.safe_load(RECIPE.read_text())
    tiny = {
        "base": {
            "model": {"teacher": str(files / "teacher")},
            "data": {"train": str(files / "train.jsonl"), "text": str(files / "text.txt")},
        },
        "sizes": {"24-layers": {"model": {"drop_layers": [2, 3]}}, "18-layers": {"model": {"drop_layers": [1, 3]}}},
        "smoke": {
            "results": str(files / "results"),
            "work": str(files / "work"),
            "base": {"data": {"max_prompt_length": 64}},
            "methods": {"minillm": {"objective": {"pt_length": 16}}},
            "evaluate": {name: {"data": {"eval": str(files / "eval.jsonl")}} for name in tree["evaluate"]},
        },
    }
    for name in tree["evaluate"]:
        tiny["smoke"]["evaluate"][name]["eval"] = {"max_prompt_length": 64}
    merge(tree, tiny)
    return tree


@pytest.fixture
def study(files, tree):
    del tree["sizes"]["24-layers"], tree["ablations"]["no-teacher-mixing"], tree["ablations"]["no-single-step"]
    path = files / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_the_committed_study_is_the_one_asked_for():
    plan = load_study(RECIPE)
    cells = plan.cells()
    assert len(cells) == len(set(cells)) == 1 + 3 * (2 * 5 + 3 + 2)
    assert list(plan.methods) == ["minillm", "sft", "kd", "seqkd"] and len(plan.sizes) == 2
    for name, section, key, value in (
        ("no-length-norm", "objective", "length_norm", False),
        ("no-teacher-mixing", "rollout", "alpha", 0.0),
        ("no-single-step", "objective", "single_step", False),
    ):
        config = plan.recipe(Cell(plan.ablated_size, name, 1)).stages[name]
        assert config.method == "minillm" and getattr(getattr(config, section), key) == value
    lr = {name: plan.recipe(Cell("24-layers", name, 1)).stages[name].optim.lr for name in ("lower-lr", "sft")}
    assert lr["lower-lr"] < lr["sft"]
    names = (*plan.methods, *plan.ablations, *plan.variations)
    starts = {plan.recipe(Cell("18-layers", name, 2)).run.model.student for name in names}
    assert len(starts) == 1  # the same initialisation


def test_one_cell_after_the_other_then_the_page(study, files, capsys):
    pytest.importorskip("matplotlib", reason="the page is an optional extra")
    command = ["study", str(study), "--smoke"]
    assert main([*command, "--report", str(files / "study.md")]) == 2
    assert "no finished cell" in capsys.readouterr().err
    assert main(command) == 0
    assert "== teacher" in capsys.readouterr().out and (files / "work/teacher-answers.jsonl").exists()
    assert main([*command, "--all"]) == 0
    assert "0 of 8 cells left" in capsys.readouterr().out
    assert main([*command, "--list"]) == 0
    assert capsys.readouterr().out.count("done") == 8

    plan = load_study(study, smoke=True)
    found = {c: json.loads(plan.result(c).read_text()) for c in plan.cells()}
    for size in plan.sizes:
        budget = found[Cell(size, "minillm", 0)]["training"]["num_tokens"]
        for name in ("sft", "kd", "seqkd"):
            config = found[Cell(size, name, 0)]["config"]["stages"][name]
            tokens, steps = found[Cell(size, name, 0)]["training"]["num_tokens"], config["optim"]["steps"]
            assert tokens >= budget and tokens * (steps - 1) / steps < budget * 1.2  # equal to about a step
        assert (files / "work" / size / "start-0/model").exists()  # others begin there; the rest is deleted
        assert not (files / "work" / size / "sft-0").exists()
    record = found[Cell("18-layers", "no-length-norm", 0)]
    assert set(record["evaluations"]) == {"held-out", "selfinst", "vicuna"}
    assert (
        "exposure_bias" in record["evaluations"]["held-out"] and "calibration" not in record["evaluations"]["vicuna"]
    )

    assert main([*command, "--report", str(files / "study.md")]) == 0
    text = (files / "study.md").read_text()
    tokens = found[Cell("18-layers", "kd", 0)]["training"]["num_tokens"]
    assert (
        f"| kd | 1 | {tokens:,.0f} |" in text and "**open**" in text and "**holds**" not in text
    )  # one seed decides nothing
    lower = found[Cell("18-layers", "lower-lr", 0)]["training"]["num_tokens"]
    assert f"| lower-lr | 1 | {lower:,.0f} |" in text and "`{optim: {lr: 3e-5}}`" in text
    assert not [line for line in text.partition("## Variations")[2].splitlines() if "**open**" in line]
    images = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(images) == 4 and all((files / image).exists() for image in images)


def test_the_committed_page_is_what_the_committed_cells_give(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the page is an optional extra")
    monkeypatch.chdir(RECIPE.parents[2])
    assert main(["study", "recipes/study/study.yaml", "--report", str(tmp_path / "study.md")]) == 0
    assert (tmp_path / "study.md").read_text() == Path("docs/study.md").read_text()
    figures = {path.name for path in (tmp_path / "study").glob("*.png")}
    assert figures == {path.name for path in Path("docs/study").glob("*.png")}


def test_several_runs_share_the_cells_and_wait_for_what_they_need(study, monkeypatch, capsys):
    plan, ran = load_study(study, smoke=True), []

    def run(plan, cell, command):
        ran.append(cell.path)
        plan.result(cell).parent.mkdir(parents=True, exist_ok=True)
        plan.result(cell).write_text("{}")
        return plan.result(cell)

    monkeypatch.setattr(cell, "run_cell", run)
    command = ["study", str(study), "--smoke"]
    with plan.lock("teacher"):
        assert main(command) == 0 and ran == ["18-layers/start-0"]
        assert main(command) == 0 and ran == ["18-layers/start-0"]  # all others need the teacher's answers
        assert "other runs are at all cells that could run now" in capsys.readouterr().out
    main(command)
    with plan.lock("18-layers/minillm-0"):
        main(command)
        assert ran[1:] == ["teacher", "18-layers/no-length-norm-0"]  # those in between are held to minillm's tokens
    main([*command, "--all"])
    assert ran[3:] == [f"18-layers/{name}-0" for name in ("minillm", "sft", "kd", "seqkd", "lower-lr")]


def test_what_stops_an_evaluation_does_not_cost_the_training(study, monkeypatch):
    plan, calls = load_study(study, smoke=True), []
    trained, evaluated = minillm.distill, cell.evaluations
    monkeypatch.setattr(minillm, "distill", lambda *args, **options: calls.append(1) or trained(*args, **options))

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cell, "evaluations", fail)
    start = plan.cells()[1]
    with pytest.raises(KeyboardInterrupt):
        cell.run_cell(plan, start, "")
    assert plan.unfinished()[1] == start and calls == [1]
    monkeypatch.setattr(cell, "evaluations", evaluated)
    cell.run_cell(plan, start, "")
    assert start not in plan.unfinished() and calls == [1]


def test_a_study_goes_on_where_only_its_json_is(study, files, capsys):
    plan = load_study(study, smoke=True)
    teacher, start, minillm, *_, seqkd, _, _ = plan.cells()
    for each in (teacher, start, minillm):
        cell.run_cell(plan, each, "")
    before = json.loads(plan.result(start).read_text())["training"]["num_tokens"]
    shutil.rmtree(files / "work")
    record = json.loads(cell.run_cell(plan, seqkd, "").read_text())
    assert "trained again" in capsys.readouterr().out and record["training"]["num_tokens"] > 0
    assert json.loads(plan.result(start).read_text())["training"]["num_tokens"] == before


def test_steps_reach_the_budget_and_no_more():
    tokens = [10, 20, 30, 40]  # two a step: each epoch is two steps and 100 tokens
    assert steps_to_reach(100, tokens, 0, 2) == 2
    assert steps_to_reach(101, tokens, 0, 2) == 3
    assert steps_to_reach(1, tokens, 0, 2) == 1


def test_verdicts_by_hand():
    low, high = document.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert document.judge(0.1, 0.3, better=1) == "holds" and document.judge(0.1, 0.3, better=-1) == "fails"
    assert document.judge(-0.3, -0.1, better=-1) == "holds" and document.judge(-0.1, 0.1, better=1) == "open"
    assert document.judge(*document.interval([5.0]), better=1) == "open"


def test_rounding_keeps_six_digits():
    assert rounded({"a": [1.23456789, 3, "x", True, None]}) == {"a": [1.23457, 3, "x", True, None]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methds": {}}, "did you mean 'methods'"),
        ({"seeds": []}, "no section `seeds`"),
        ({"ablations": {"size": "9-layers"}}, "value of ablations.size: '9-layers'"),
        ({"methods": {"sft": {"optim": {"lrr": 1}}}}, "did you mean 'lr'"),
        ({"evaluate": {"vicuna": {"eval": {"sampls": 1}}}}, "did you mean 'samples'"),
    ],
)
def test_a_study_that_cannot_be_run(files, tree, change, message):
    merge(tree, change)
    path = files / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message):
        load_study(path)
    with pytest.raises(FileNotFoundError, match="no study at"):
        load_study(files / "none.yaml")


def test_differences_are_within_seed_and_size_and_all_sizes_are_their_union():
    metric = document.Metric("ROUGE-L", lambda record: record["value"], 2, 1)
    values = {("small", 0): (3, 1), ("small", 1): (5, 1), ("large", 0): (9, 1)}
    records = {
        Cell(size, name, seed): {"value": value}
        for (size, seed), pair in values.items()
        for name, value in zip(("minillm", "kd"), pair, strict=True)
    }
    del records[Cell("small", "kd", 1)]  # not done yet
    pair = ("minillm", "kd")
    records[Cell("large", "kd", 2)] = {"value": 7}
    assert document._difference(records, "small", ["small"], pair, metric).values == [2]
    assert document._difference(records, document.ALL, ["small", "large"], pair, metric).values == [2, 8]
    assert document._difference(records, "small", ["small"], ("minillm", "sft"), metric) is None


def test_verdicts_in_words_name_what_is_decided_and_count_what_is_open():
    metric = document.Metric("ROUGE-L", float, 2, 1)

    def difference(rival, *values):
        return document.Difference("small", rival, metric, list(values))

    found = [difference("sft", 1.0, 1.1, 0.9), difference("kd", -1.0, -1.1, -0.9), difference("seqkd", 1.0, -1.0, 0.5)]
    text = document.in_words([*found, difference("gkd", 9.0)])  # of one seed: open, whatever it is
    assert "- ROUGE-L: holds against sft (small); fails against kd (small); open in 2 of 4." in text
    assert "3 of these differences have two seeds or more" in text
    assert str(found[0]) == "+1.00 [+0.75, +1.25] **holds**"
