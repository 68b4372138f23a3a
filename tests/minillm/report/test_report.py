"""The page, from two tiny runs and their evaluations."""

import base64
import html.parser
import json
import os
import random
import re
import sys

import pytest

from minillm.cli import main
from minillm.data.sources import DataError
from minillm.report import figures, page
from minillm.report.read import read_sources

pytest.importorskip("matplotlib", reason="the report is an optional extra")


def bins(shift):
    return [
        {"lower": m / 10, "upper": (m + 1) / 10, "count": m * 5, "confidence": (m + 0.5) / 10 if m else None,
         "accuracy": min(1, (m + 0.5) / 10 + shift) if m else None}
        for m in range(10)
    ]  # fmt: skip


def responses(greedy):
    return {"prompt": "Say <b>", "references": ["<i>right</i>"], "greedy": greedy, "sampled": ""}


def evaluation(shift=0.0, **changes):
    """What minillm evaluate writes, as far as the report reads it."""
    mean = {"mean": 20.0 + 10 * shift, "standard_error": 1.5, "prompts": 8, "count": 8}
    by_seed = [mean["mean"] + deviation for deviation in (-0.4, 0.0, 0.4)]
    sampled = {**mean, "standard_deviation": 0.4, "by_seed": by_seed}
    scores = {"prompts": 4, "rouge_l/sampled": mean, "rouge_l/greedy": mean}
    calibrated = {"ece": 0.1 + shift, "accuracy": 0.5, "confidence": 0.6, "count": 225, "bins": bins(shift)}
    length = {"mean": 7.0, "at_limit": 0.1}
    tree = {
        "model": "m", "teacher": "t", "data": "package:vicuna", "prompts": 8, "command": "minillm evaluate m <x>",
        "generation": {"sampled": {"temperature": 1.0}, "no_repeat_ngram_size": 0},
        "rouge_l": {"greedy": mean, "sampled": sampled}, "exact_match": {"greedy": mean, "sampled": sampled},
        "by_reference_length": {"<=5": scores, "6-10": {"prompts": 0}, ">=11": scores},
        "distinct": {str(n): {"mean": 90.0, "standard_deviation": 1.0, "by_seed": [90.0]} for n in (1, 2, 3, 4)},
        "length": {"greedy": length, "sampled": length, "references": 6.0}, "tokens_per_second": 123.4, "loss": mean,
        "calibration": {"next_token": calibrated},
        "reverse_kl": {"own_samples": mean, "references": mean},
        "forward_kl": {"teacher_samples": mean, "references": mean},
        "exposure_bias": {"definition": "ExAccErr(l) = <formula>", "length": [1, 2], "exaccerr": [0.0, 30.0 + shift],
                          "standard_error": [0.0, None], "regret": [1, 3], "expected": [1, 2],
                          "samples_reaching": {"student": [2, 1], "teacher": [2, 2]}},
        "responses": [responses(f"answer {shift}")],
        "environment": {"torch": "2", "kernel_backends": {"cpu": "ok"}},
    }  # fmt: skip
    return tree | changes


@pytest.fixture
def runs(tmp_path):
    for name, shift in (("sft", 0.0), ("minillm", 0.2)):
        folder = tmp_path / name
        folder.mkdir()
        rows = [
            {"stage": stage, "step": step, "loss": 1 / step, "grad_norm": 1.0, "kl/reverse": 2 - step / 60}
            for stage, steps in (("warm-up", range(1, 31)), ("minillm", range(31, 35)))
            for step in steps
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "mini')
        (folder / "evaluation.json").write_text(json.dumps(evaluation(shift)))
        (folder / "environment.json").write_text(json.dumps({"cpu": "EPYC"}))
        (folder / "summary.json").write_text(json.dumps({"command": "minillm distill r.yaml"}))
        (folder / "config.yaml").write_text("stages: {warm-up: {}, minillm: {}}")
        (folder / "evaluations").mkdir()
        for stage in ("start", "minillm", "teacher"):  # the first stage is being evaluated, say
            found = {"greedy": {"mean": 1.25, "standard_error": 0.01, "prompts": 8, "count": 8}}
            tree = {"prompts": 8, "generation": {}, "rouge_l": found, "responses": [responses(f"{name} at {stage}")]}
            (folder / "evaluations" / f"{stage}.json").write_text(json.dumps(tree))
    return tmp_path


class Outside(html.parser.HTMLParser):
    """Addresses that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ("src", "href") and not (v or "").startswith("data:")]


def test_one_page_that_needs_no_other_file(runs, capsys):
    out = runs / "report"
    assert main(["report", str(runs / "sft"), str(runs / "minillm"), "--out", str(out)]) == 0
    text = (out / "index.html").read_text()
    outside = Outside()
    outside.feed(text)
    assert outside.found == []
    pngs = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert set(pngs) == {"curves.png", "exposure.png", "reliability.png", "lengths.png"}
    assert {base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", text)} == set(pngs.values())
    for expected in ("20.00 ± 0.40", "22.00 ± 0.40", "ExAccErr(2), %", "1.250 ± 0.010", "EPYC", "answer 0.2"):
        assert expected in text
    assert "&lt;i&gt;right&lt;/i&gt;" in text and "<i>right" not in text  # models write what they like
    assert "differ" not in text and "index.html" in capsys.readouterr().out


def test_evaluations_that_cannot_be_compared_are_told(runs, tmp_path):
    other = evaluation(generation={"sampled": {"temperature": 0.5}, "no_repeat_ngram_size": 6})
    (tmp_path / "other.json").write_text(json.dumps(other))
    more = evaluation(prompts=9)
    (tmp_path / "more.json").write_text(json.dumps(more))
    for name in ("other", "more"):
        sources = read_sources([str(runs / "sft"), str(tmp_path / f"{name}.json")])
        assert page.html(sources, tmp_path / "report").count("not comparable") == 1


def test_responses_of_a_run_stand_side_by_side(runs, tmp_path):
    (runs / "sft" / "evaluation.json").unlink()
    (source,) = read_sources([str(runs / "sft")])
    assert list(source.stages) == ["start", "minillm", "teacher"]
    text = page.html([source], tmp_path / "report")
    cells = ["sft at start", "sft at minillm", "sft at teacher", "&lt;i&gt;right&lt;/i&gt;"]
    assert "<td>Say &lt;b&gt;</td>" + "".join(f"<td>{cell}</td>" for cell in cells) in text.replace(" class=", "")


def test_a_run_without_evaluation_and_an_evaluation_without_run(runs, tmp_path):
    (runs / "sft" / "evaluation.json").unlink()
    text = page.html(read_sources([str(runs / "sft")]), tmp_path / "report")
    assert "Learning curves" in text and "Exposure bias" not in text
    alone = evaluation()
    del alone["exposure_bias"], alone["reverse_kl"], alone["forward_kl"]  # no teacher
    (tmp_path / "alone.json").write_text(json.dumps(alone))
    text = page.html(read_sources([str(tmp_path / "alone.json")]), tmp_path / "report")
    assert "Calibration" in text and "Learning curves" not in text and "reverse KL" not in text


def test_names_are_the_shortest_that_differ(runs):
    (runs / "deep" / "sft").mkdir(parents=True)
    (runs / "deep" / "sft" / "evaluation-a.json").write_text(json.dumps(evaluation()))
    (runs / "deep" / "sft" / "evaluation-b.json").write_text(json.dumps(evaluation()))
    first, second = read_sources([str(runs / "sft"), str(runs / "deep" / "sft")])
    assert first.name.endswith("/sft") and second.name == "deep/sft"
    assert list(second.results) == ["deep/sft, a", "deep/sft, b"]


def test_what_is_no_run(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "give a run directory" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"holds no metrics.jsonl"):
        read_sources([str(tmp_path)])
    file = tmp_path / "a.json"
    for text, message in (("{", "is not JSON"), ('{"rouge_l": 1}', "is no evaluation"), ("[]", "is no evaluation")):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_sources([str(file)])
    assert main(["report", str(file), "--optim.lr=1"]) == 2


def leaves(tree, above=()):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*above, key)
        if isinstance(value, (dict, list)):
            yield from leaves(value, (*above, key))


def test_an_evaluation_with_any_other_value_is_reported_or_refused(tmp_path, monkeypatch):
    """Each value in turn of another kind, or taken away: a page, or one error that names the file."""
    (tmp_path / "image.png").touch()
    monkeypatch.setattr(figures, "save", lambda figure, path: tmp_path / "image.png")  # drawing is slow
    file, refused = tmp_path / "a.json", 0
    original = json.dumps(evaluation())
    chosen = random.Random(0).sample(
        [(p, v) for p in leaves(evaluation()) for v in (None, "x", -1, 10**400, [], {}, [[]], ["x"], {"x": 3}, True)],
        60,
    )
    for place, value in chosen:
        tree = json.loads(original)
        node = tree
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
        file.write_text(json.dumps(tree))
        try:
            text = page.html(read_sources([str(file)]), tmp_path / "report")
        except DataError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert text.endswith("</html>\n")
    assert 15 < refused < 60


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"stage": "a", "step": 1}\n3\n', "metrics.jsonl, record 2 is no line of a run's log"),
        ("metrics.jsonl", '{"stage": "a"}\n', "record 1 is no line"),
        ("metrics.jsonl", '{"stage": 3, "step": 1}\n', "record 1 is no line"),
        ("metrics.jsonl", '{"stage": "a", "step": 1, "loss": "x"}\n', "record 1 is no line"),
        ("metrics.jsonl", '{"stage": "a", "step": 1, "loss": 1' + "0" * 400 + "}\n", "record 1 is no line"),
        ("evaluation.json", "[" * 99_999, "evaluation.json is not JSON: maximum recursion"),
        ("evaluation.json", b"\xff", "evaluation.json is not JSON"),
        ("summary.json", "{", "summary.json is not JSON"),
        ("environment.json", "[" * 99_999, "environment.json is not JSON"),
        ("config.yaml", "a: [", "config.yaml is not valid YAML"),
        ("config.yaml", "a: !!x", "config.yaml is not valid YAML"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(runs, capsys, file, content, message):
    (runs / "sft" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["report", str(runs / "sft"), "--out", str(runs / "report")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("content", ["", "3", "stages: 3", "stages: [a]", "stages: {../../evaluation: {}}", "x: 1"])
def test_a_configuration_that_names_no_stages(runs, content):
    (runs / "sft" / "config.yaml").write_text(content)
    (source,) = read_sources([str(runs / "sft")])
    assert list(source.stages) == ["start", "teacher"]


def test_links_are_replaced_and_what_they_point_to_stays(runs, tmp_path):
    out, outside = tmp_path / "report", tmp_path / "precious"
    out.mkdir()
    outside.write_text("mine")
    names = ("index.html", "curves.png", "exposure.png", "reliability.png", "lengths.png")
    for name in names:
        (out / name).symlink_to(outside)
        (out / f".{name}.{os.getpid()}").symlink_to(outside)  # under which it is written first
    assert main(["report", str(runs / "sft"), "--out", str(out)]) == 0
    assert outside.read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_name_is_no_formula(runs, tmp_path):
    name = r"a$\frac{$b.json"
    (tmp_path / name).write_text(json.dumps(evaluation()))
    text = page.html(read_sources([str(runs / "sft"), str(tmp_path / name)]), tmp_path / "report")
    assert r"a$\frac{$b" in text


def test_without_matplotlib_the_command_is_named(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(runs / "sft"), "--out", str(runs / "report")]) == 2
    assert 'pip install "minillm-kernels[report]"' in capsys.readouterr().err
    assert not (runs / "report").exists()


def test_smoothing_by_hand():
    assert figures.smooth([1.0, 2.0, 6.0], window=3) == pytest.approx([1.5, 3.0, 4.0])


def test_curves_break_between_stages(runs):
    rows = read_sources([str(runs / "sft")])[0].metrics
    assert len(rows) == 34  # the line that was still being written is left out
    panel = figures.learning_curves({"sft": rows}).axes[0]
    spans = [line.get_xdata() for line in panel.lines]
    assert not any(min(x) <= 30 and max(x) >= 31 for x in spans if len(x) > 2)
