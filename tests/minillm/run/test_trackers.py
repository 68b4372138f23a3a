"""What a tracker is given, read back from the files of the one that needs no server."""

import json

import pytest

from minillm.cli import main


def test_tensorboard_gets_what_metrics_jsonl_holds(files):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="trackers are the user's to install"
    )
    assert main(["train", str(files / "recipe.yaml"), "--log.trackers=tensorboard"]) == 0
    rows = [json.loads(line) for line in (files / "run/metrics.jsonl").read_text().splitlines()]
    events = event_accumulator.EventAccumulator(str(files / "run/minillm"))
    events.Reload()
    for key in ("loss", "kl/reverse", "grad_norm"):  # the second only of the second stage
        expected = [(row["step"], row[key]) for row in rows if key in row]
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.parametrize(
    ("names", "says"), [("tensorbord", "did you mean 'tensorboard'?"), ("clearml", "pip install clearml")]
)
def test_a_tracker_that_cannot_be_used_is_named_before_any_work(files, capsys, names, says):
    if names == "clearml":
        try:
            import clearml  # noqa: F401
        except ModuleNotFoundError:
            pass
        else:
            pytest.skip("clearml is installed here")
    assert main(["train", str(files / "recipe.yaml"), f"--log.trackers={names}"]) == 2
    assert says in capsys.readouterr().err and not (files / "run").exists()
