"""Forecasts for a mesh: the arithmetic of decoding by hand, what is held by the counts of one process."""

import pytest
import yaml

from minillm.cli import main
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError
from minillm.model.cost import cost
from minillm.model.forecast import GPUS, SPARE, Mesh, Model, Placement, forecasts, gather_seconds, parse_mesh
from minillm.model.forecast import token_seconds as seconds

HOST = Mesh(GPUS["h100"], 8)
STUDENT = Model(3_100_000_000, 28, 90_000_000, 470_000_000, 3072, 304_000)  # 1.5B in bfloat16
TEACHER = Model(15_200_000_000, 28, 460_000_000, 1_090_000_000, 7168, 304_000)  # 7B
LARGE = Model(141_000_000_000, 80, 1_700_000_000, 2_100_000_000, 16384, 257_000)  # 70B
ROWS = 32


def split(weights: float, layers: int, teacher: Model) -> float:
    """Milliseconds: weights / 3.35 TB/s; two sums a layer, 2 · 7/8 · 256 rows each over 360 GB/s, and the logits once;
    the latency of each."""
    moved = 1.75 * 256 * 2 * layers * teacher.hidden + 0.875 * 256 * teacher.logits
    return weights / 3.35 + moved / 360e6 + (2 * layers + 1) * 0.015


@pytest.mark.parametrize(
    ("teacher", "where", "milliseconds"),
    [
        (TEACHER, "replicate", (3.1 + 15.2) / 3.35),
        (TEACHER, "shard", (3.1 + 15.2) / 3.35),  # gathered once
        (TEACHER, "tensor", split(3.1 + 15.2 / 8, 28, TEACHER)),
        (LARGE, "tensor", split(3.1 + 141 / 8, 80, LARGE)),
    ],
)
def test_a_decoded_token(teacher, where, milliseconds):
    found = seconds(HOST, STUDENT, teacher, Placement("shard", where), ROWS)
    assert found * 1000 == pytest.approx(milliseconds, rel=1e-9)


def test_gathering_once_is_what_makes_shards_decode_fast():
    """Weights of teacher and student left in shards would cost 44 ms a token beside the 5.5 of reading them."""
    assert gather_seconds(HOST, STUDENT.weights + TEACHER.weights) == pytest.approx(0.0445, rel=1e-2)
    assert seconds(HOST, STUDENT, TEACHER, Placement("shard", "replicate"), ROWS) == pytest.approx(5.46e-3, rel=1e-2)


def test_one_gpu_holds_what_one_process_holds(files):
    recipe = load_recipe(files / "recipe.yaml")
    one = Mesh(GPUS["h100"], 1)
    for stage in recipe.stages.values():
        found = forecasts(one, recipe.run, stage)
        assert found[0].memory == cost(recipe.run, stage).peak
        assert found[0].update > 0 and all(each.decode > 0 for each in found) == (stage.method == "minillm")


def test_shards_are_smaller_and_more_gpus_faster(files):
    recipe = load_recipe(files / "recipe.yaml")
    stage = recipe.stages["warm-up"]
    found = {f.placement: f for f in forecasts(Mesh(GPUS["h100"], 2), recipe.run, stage)}
    held = cost(recipe.run, stage, 2).held
    whole, shards = found[Placement("replicate", "replicate")], found[Placement("shard", "replicate")]
    saved = 1 / 2 * (held["student"] + held["gradients"] + held["AdamW"])
    assert 0.8 * saved < whole.memory - shards.memory < saved  # two layers are whole while they compute
    assert shards.update > whole.update - 1e-6
    assert found[Placement("shard", "tensor")].memory < shards.memory
    assert Placement("shard", "offload") in found  # reads whole batches


def test_a_teacher_that_draws_is_whole_while_it_does(files):
    recipe = load_recipe(files / "recipe.yaml")
    found = {f.placement: f for f in forecasts(HOST, recipe.run, recipe.stages["minillm"])}
    whole, shards = (found[Placement("replicate", where)] for where in ("replicate", "shard"))
    assert shards.decode > whole.decode  # gathered first


def test_gpus_that_compute_a_teacher_together_decode_all_sequences_of_their_host(files):
    recipe = load_recipe(files / "recipe.yaml", ["--stages.minillm.rollout.batch_size=16384"])
    stage = recipe.stages["minillm"]  # whose rollouts take more than its updates
    for mesh in (Mesh(GPUS["h100"], 2), Mesh(GPUS["h100"], 2, 2)):
        found = {f.placement: f for f in forecasts(mesh, recipe.run, stage)}
        counted = cost(recipe.run, stage, mesh.gpus)
        whole, parts = (found[Placement("replicate", where)] for where in ("replicate", "tensor"))
        doubled = sum(counted.rollout.values()) - counted.rollout["caches of the teacher"]
        assert parts.memory - whole.memory == doubled - counted.held["teacher"] // 2
    placements = {f.placement.teacher for f in forecasts(HOST, recipe.run, stage)}
    assert placements == {"replicate", "shard", "offload"}  # 4 heads are not for 8


def test_the_command_names_the_first_that_fits(files, capsys, monkeypatch):
    recipe = yaml.safe_load((files / "recipe.yaml").read_text())
    assert main(["estimate", str(files / "recipe.yaml"), "--gpus", "2x8xh100"]) == 0
    out = capsys.readouterr().out
    assert out.count("the first that fits: parallel: {student: replicate, teacher: replicate, hosts: 2}") == 2
    assert "not measured" in out and len(recipe["stages"]) == 2
    monkeypatch.setitem(GPUS, "h100", GPUS["h100"]._replace(memory=1.0))
    assert main(["estimate", str(files / "recipe.yaml"), "--gpus", "8xh100"]) == 0
    assert "nothing fits" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"8xh1000'; expected 8xh100, or 2x8xh100"):
        parse_mesh("8xh1000")
    assert 0 < SPARE < 1 and parse_mesh("2x4xA100") == Mesh(GPUS["a100"], 4, 2)
