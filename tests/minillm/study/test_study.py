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
from minillm.evaluation.result import Evaluation
from minillm.study import cell, choice
from minillm.study.cell import rounded, steps_to_reach
from minillm.study.plan import Cell, load_study

RECIPE = Path(__file__).parents[3] / "recipes/study/study.yaml"


@pytest.fixture
def tree(files):
    """The committed study, its smoke sizes, and nothing of it but models and data replaced."""
    tree = yaml.safe_load(RECIPE.read_text())
    tree.pop("appendix")
    sets = {name: {"data": {"eval": str(files / "eval.jsonl")}} for name in tree["evaluate"]}
    tiny = {
        "base": {
            "model": {"teacher": str(files / "teacher")},
            "data": {"train": str(files / "train.jsonl"), "text": str(files / "text.txt")},
        },
        "start": {"model": {"drop_layers": [2, 3]}},
        "smoke": {"results": str(files / "results"), "work": str(files / "work")},
        "validate": {"data": {"eval": str(files / "eval.jsonl")}},
        "evaluate": sets,
    }
    merge(tree, tiny)
    return tree


@pytest.fixture
def study(files, tree):
    """Without what is like something else in it."""
    del tree["ablations"]["no-teacher-mixing"], tree["ablations"]["no-single-step"], tree["methods"]["kd"]
    for name in ("sft", "seqkd", "gkd"):
        del tree["methods"][name]["grid"]
    path = files / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_the_committed_study_is_the_one_laid_down():
    plan = load_study(RECIPE)
    cells = plan.cells()
    assert len(cells) == len(set(cells)) == (2 + 1) + 3 + (3 + 4 * 2) + 3 * 5 + (3 + 2)
    assert plan.methods == ["minillm", "sft", "kd", "seqkd", "gkd"] and plan.gate == 2.5
    for name, section, key, value in (
        ("no-length-norm", "objective", "length_norm", False),
        ("no-teacher-mixing", "rollout", "alpha", 0.0),
        ("no-single-step", "objective", "single_step", False),
    ):
        config = plan.recipe(Cell(name, 0), "lr=2e-05").stages[name]
        assert config.method == "minillm" and getattr(getattr(config, section), key) == value
        assert config.optim.lr == 2e-5
    assert plan.recipe(Cell("minillm", 1), "lr=2e-05").stages["minillm"].objective.pt_weight == 0
    starts = {plan.recipe(Cell(name, 2)).run.model.student for name in plan.methods}
    assert starts == {"runs/study/start-2/model"}  # the same initialisation
    teachers = {plan.recipe(c).run.model.teacher for c in cells if c.name != "teacher"}
    assert teachers == {"runs/study/teacher-0/model"}
    profile = load_study(RECIPE, "card").recipe(Cell("minillm", 0)).stages["minillm"]
    assert (profile.optim.batch_size, profile.rollout.max_new_tokens, profile.optim.steps) == (64, 128, 128)


def test_one_cell_after_the_other_then_the_page(study, files, capsys):
    pytest.importorskip("matplotlib", reason="the page is an optional extra")
    command = ["study", str(study), "--smoke"]
    assert main([*command, "--report", str(files / "study.md")]) == 0
    assert "14 of 14 cells are not done yet" in (files / "study.md").read_text()  # the protocol, before any cell
    assert main(command) == 0
    assert "== grid/teacher-lr=3e-05" in capsys.readouterr().out
    assert main([*command, "--all"]) == 0
    assert "0 of 14 cells left" in capsys.readouterr().out
    assert main([*command, "--list"]) == 0
    assert capsys.readouterr().out.count("done") == 14

    plan = load_study(study, "smoke")
    found = {c: json.loads(plan.result(c).read_text()) for c in plan.cells()}
    losses = {c.candidate: found[c]["validation"]["loss"]["mean"] for c in plan.candidates("teacher")}
    assert choice.choose(plan, "teacher") == min(losses, key=losses.get)
    scores = {c.candidate: found[c]["validation"]["rouge_l"]["sampled"]["mean"] for c in plan.candidates("minillm")}
    chosen = choice.choose(plan, "minillm")
    assert scores[chosen] == max(scores.values())
    ours, candidate = found[Cell("minillm", 0)], found[Cell("minillm", 0, chosen)]
    assert ours["training"] == candidate["training"] and ours["validation"] == candidate["validation"]
    assert "evaluations" not in candidate
    assert f"lr={found[Cell('half-teacher', 0)]['config']['stages']['half-teacher']['optim']['lr']}" == chosen
    budget = ours["training"]["response_tokens"]
    for name in ("sft", "seqkd"):
        config = found[Cell(name, 0)]["config"]["stages"][name]
        tokens, steps = found[Cell(name, 0)]["training"]["response_tokens"], config["optim"]["steps"]
        assert budget <= tokens and tokens * (steps - 1) / steps < budget * 1.2  # equal to about a step
        assert not (files / "work" / f"{name}-0/model").exists()
    assert (files / "work/start-0/model").exists() and (files / "work/teacher-0/model").exists()  # others need them
    record = found[Cell("no-length-norm", 0)]
    assert set(record["evaluations"]) == {"test", "exposure"}
    totals, counts, samples = record["evaluations"]["test"]["per_prompt"]["rouge_l/sampled"]
    assert [sum(column) for column in zip(*samples, strict=True)] == pytest.approx(totals) and counts == [2, 2, 2, 2]
    assert len(record["evaluations"]["test"]["reference_lengths"]) == 4
    assert "exposure_bias" in record["evaluations"]["exposure"]

    assert main([*command, "--report", str(files / "study.md")]) == 0
    text = (files / "study.md").read_text()
    assert f"| minillm | 1 | {budget:,.0f} |" in text and "the gate, -100, is passed" in text
    assert "ROUGE-L of minillm minus " + choice.best_rival(plan) in text
    images = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(images) == 4 and all((files / image).exists() for image in images)


def test_the_committed_page_is_what_the_committed_cells_give(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the page is an optional extra")
    monkeypatch.chdir(RECIPE.parents[2])
    assert main(["study", "recipes/study/study.yaml", "--report", str(tmp_path / "study.md")]) == 0
    assert (tmp_path / "study.md").read_text() == Path("docs/study.md").read_text()
    figures = {path.name for path in (tmp_path / "study").glob("*.png")}
    assert figures == {path.name for path in Path("docs/study").glob("*.png")}


def written(plan, each, rouge=10.0, loss=1.0, tokens=100.0):
    """The JSON of a cell, as far as the choice reads it."""
    mean = {"standard_error": 0.1, "prompts": 4, "count": 4}
    means = {"rouge_l": {"sampled": {"mean": rouge} | mean}, "loss": {"mean": loss} | mean}
    tree = {"validation": {"prompts": 4, "generation": {}} | means, "training": {"response_tokens": tokens}}
    plan.result(each).parent.mkdir(parents=True, exist_ok=True)
    plan.result(each).write_text(json.dumps(tree))
    assert Evaluation.from_dict(tree["validation"]).means["loss"].mean == loss


def test_the_validation_chooses_and_the_gate_stops(study, monkeypatch):
    plan = load_study(study, "smoke")
    one, other = plan.candidates("teacher")
    written(plan, one, rouge=20, loss=2.0)
    written(plan, other, rouge=10, loss=1.5)
    assert choice.choose(plan, "teacher") == other.candidate  # by the loss
    low, high, middle = plan.candidates("minillm")
    for each, rouge, tokens in ((low, 1, 10), (high, 3, 30), (middle, 2, 20)):
        written(plan, each, rouge=rouge, tokens=tokens)
    assert choice.choose(plan, "minillm") == choice.choose(plan, "half-teacher") == high.candidate
    assert choice.budget(plan, 0) == 30
    for name, rouge in (("sft", 2), ("seqkd", 4), ("gkd", 3)):
        written(plan, Cell(name, 0), rouge=rouge)
    assert choice.best_rival(plan) == "seqkd"
    written(plan, plan.teacher, rouge=12)
    written(plan, Cell("start", 0), rouge=10)
    assert choice.headroom(plan) == 2
    strict = load_study(study)
    assert strict.gate == 2.5
    monkeypatch.setattr(type(plan), "unfinished", lambda self: [Cell("sft", 0)])
    with pytest.raises(ConfigError, match=r"2\.00 above the start's .* the gate asks for 2\.5"):
        cell.run_next(load_with(study, plan, strict.gate), "")


def load_with(path, plan, gate):
    """The study of the smoke profile at another gate."""
    tree = yaml.safe_load(path.read_text())
    tree["smoke"]["gate"] = gate
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_study(path, "smoke")


def test_several_runs_share_the_cells_and_wait_for_what_they_need(study, monkeypatch, capsys):
    plan, ran = load_study(study, "smoke"), []

    def run(plan, each, command):
        ran.append(each.path)
        written(plan, each)
        return plan.result(each)

    monkeypatch.setattr(cell, "run_cell", run)
    command = ["study", str(study), "--smoke"]
    with plan.lock("grid/teacher-lr=3e-05"):
        assert main(command) == 0 and ran == ["grid/teacher-lr=0.0001"]
        assert main(command) == 0 and len(ran) == 1  # all others need the teacher
        assert "other runs are at all cells that could run now" in capsys.readouterr().out
    main([*command, "--all"])
    assert ran[1:4] == ["grid/teacher-lr=3e-05", "teacher-0", "start-0"]
    assert ran[4:7] == [each.path for each in plan.candidates("minillm")]
    assert ran[7:] == [f"{name}-0" for name in ("minillm", "sft", "seqkd", "gkd", *plan.ablations, *plan.variations)]


def test_what_is_needed_comes_before(study):
    plan = load_study(RECIPE)
    order = {each: i for i, each in enumerate(plan.cells())}
    for each in plan.cells():
        assert all(order[needed] < order[each] for needed in plan.needs(each)), each
    assert Cell("minillm", 1) in plan.needs(Cell("kd", 1)) and plan.needs(plan.candidates("teacher")[0]) == []


def test_what_stops_an_evaluation_does_not_cost_the_training(study, monkeypatch):
    plan, calls = load_study(study, "smoke"), []
    trained, measured = minillm.distill, cell.measure
    monkeypatch.setattr(minillm, "distill", lambda *args, **options: calls.append(1) or trained(*args, **options))

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cell, "measure", fail)
    first = plan.cells()[0]
    with pytest.raises(KeyboardInterrupt):
        cell.run_cell(plan, first, "")
    assert plan.unfinished()[0] == first and calls == [1]
    monkeypatch.setattr(cell, "measure", measured)
    cell.run_cell(plan, first, "")
    assert first not in plan.unfinished() and calls == [1]


def test_a_cell_goes_on_behind_what_it_has_measured(study, monkeypatch):
    plan, measured, sets = load_study(study, "smoke"), cell.measure, []
    for candidate in plan.candidates("teacher"):
        cell.run_cell(plan, candidate, "")

    def stopped_at_the_second(*args):
        sets.append(args[4])
        if len(sets) == 2:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(cell, "measure", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        cell.run_cell(plan, plan.teacher, "")
    record = json.loads(cell.run_cell(plan, plan.teacher, "").read_text())
    assert sets == [plan.evaluation(name) for name in ("test", "exposure", "exposure")]
    assert list(record["evaluations"]) == ["test", "exposure"] and record["seconds"]["evaluation"] > 0
    assert not (plan.work / plan.teacher.path / "test.json").exists()
    assert (plan.model(plan.teacher)).exists()


def test_a_study_goes_on_where_only_its_json_is(study, files, capsys):
    plan = load_study(study, "smoke")
    for _ in range(4):
        cell.run_next(plan, "")
    before = json.loads(plan.result(Cell("start", 0)).read_text())["training"]["num_tokens"]
    shutil.rmtree(files / "work")
    candidate = plan.candidates("minillm")[0]
    record = json.loads(cell.run_cell(plan, candidate, "").read_text())
    out = capsys.readouterr().out
    assert "teacher-0 has left no model here: trained again" in out and record["training"]["num_tokens"] > 0
    assert "start-0 has left no model here: trained again" in out
    assert json.loads(plan.result(Cell("start", 0)).read_text())["training"]["num_tokens"] == before


def test_steps_reach_the_budget_and_no_more():
    tokens = [10, 20, 30, 40]  # two a step: each epoch is two steps and 100 tokens
    assert steps_to_reach(100, tokens, 0, 2) == 2
    assert steps_to_reach(101, tokens, 0, 2) == 3
    assert steps_to_reach(1, tokens, 0, 2) == 1


def test_rounding_keeps_six_digits():
    assert rounded({"a": [1.23456789, 3, "x", True, None]}) == {"a": [1.23457, 3, "x", True, None]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methds": {}}, "did you mean 'methods'"),
        ({"seeds": []}, "no section `seeds`"),
        ({"methods": {"sft": {"optim": {"lrr": 1}}}}, "did you mean 'lr'"),
        ({"methods": {"sft": {"grid": {"values": []}}}}, "grid of sft is"),
        ({"methods": {"sft": {"grid": {"by": "los"}}}}, "did you mean 'loss'"),
        ({"ablations": {"no-single-step": {"grid": {"key": "optim.lr", "values": [1.0]}}}}, "has a grid"),
        ({"evaluate": {"test": {"eval": {"sampls": 1}}}}, "did you mean 'samples'"),
        ({"evaluate": {"test": {"parts": ["sample"]}}}, "did you mean 'samples'"),
        ({"validate": {"eval": {"sampls": 1}}}, "did you mean 'samples'"),
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
