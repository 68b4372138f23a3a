"""Worlds of 2, 3, 4 and 2 × 2 processes beside one, in float64; tests/tools/sharded.py runs all of them, once."""

import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from minillm.config.schema import ConfigError
from minillm.parallel.mesh import check_torch

TOOL = Path(__file__).parents[2] / "tools" / "sharded.py"
METHODS = ("sft", "kd", "seqkd", "gkd", "minillm")
TAUGHT_ALIKE = ["kd", "kd packing", "seqkd", "gkd", "minillm", "minillm alpha 0", "minillm reward"]
ON_HOSTS = ["kd", "seqkd", "gkd", "minillm", "minillm alpha 0"]
SPLIT = ["kd wide teacher", "minillm coins", "minillm tied", "minillm adapters"]


def unavailable() -> str:
    try:
        check_torch()
        import transformers.distributed  # noqa: F401
    except (ConfigError, ImportError) as error:
        return str(error)
    return "" if hasattr(os, "fork") else "needs os.fork"


pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(folder, module_tokenizer):
    """What each case found, by its name, world and rank."""
    module_tokenizer.save_pretrained(folder / "tokenizer")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FIRST_PORT": str(port)}
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, TOOL, folder, folder / "tokenizer"],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"world"')]
    return {(line["case"], line["world"], line["rank"]): line for line in lines}


def compared(found) -> dict:
    return {key: case for key, case in found.items() if "gradient" in case}


SHARDED = ["sft tied packing", "sft recompute", "sft adapters", "minillm adapters", "minillm tied", *TAUGHT_ALIKE]
"""Tied and untied heads, packing, recomputation and adapters, over every method."""


@pytest.mark.parametrize(
    ("label", "worlds", "names", "student", "teacher"),
    [
        ("", (2, 3, 4), SHARDED, "shard", "shard"),
        (" 2 x 2", (4,), SHARDED, "shard", "shard"),
        (" offload", (2,), ["kd"], "shard", "shard"),
        (" tensor", (2,), [*SPLIT, *TAUGHT_ALIKE], "shard", "tensor"),
        (" tensor 2 x 2", (4,), ON_HOSTS, "shard", "tensor"),
        (" tensor copies", (2,), ["minillm"], "replicate", "tensor"),
        (" copies", (2,), ["kd several", "minillm overlap"], "replicate", "replicate"),
    ],
)
def test_gradients_and_weights_are_those_of_one_process(found, label, worlds, names, student, teacher):
    for key in [(name + label, world, rank) for name in names for world in worlds for rank in (0, world - 1)]:
        case = found[key]
        assert (case["student"], case["teacher"]) == (student, teacher), key
        assert case["gradient"] <= 1e-12 and case["weight"] <= 1e-12, (key, case)
        assert case["metric"] <= 1e-5, (key, case)  # sums in float32 of terms of either sign


def test_every_method_is_compared():
    assert {name.split()[0] for name in SHARDED} == {*METHODS}
    assert {name.split()[0] for name in TAUGHT_ALIKE} == {*METHODS} - {"sft"}


@pytest.mark.parametrize("name", ["kd half copies", "minillm half copies"])
def test_two_copies_that_compute_in_bfloat16_learn_what_one_learns(found, name):
    """Of the same sequences one by one, so that each is rounded alike."""
    case = found[name, 2, 1]
    assert case["gradient"] <= 1e-6 and case["weight"] <= 1e-6, case  # float32, added in another order


def test_a_split_head_is_read_by_a_student_that_computes_in_bfloat16(found):
    case = found["kd half tensor copies", 2, 1]
    assert case["first gradient"] <= 2e-2, case  # the teacher's states differ by rounding before they are cast


def test_an_optimiser_of_gathered_weights_is_an_error(found):
    assert found["gathered", 2, 1]["refused"]


def test_norm_and_head_move_as_they_do_in_one_process(found):
    """An optimiser of temporary weights would leave them where they were."""
    assert len(compared(found)) > 100
    for key, case in compared(found).items():
        assert case["moved"] > 1e-3, key


def test_a_rollout_gathers_each_group_once(found):
    case = found["counted", 2, 0]
    assert case["all-gathers"] == {"2": case["groups"], "12": case["groups"]}


def test_processes_whose_responses_end_elsewhere_sample_those_of_one(found):
    one, two = found["counted", 1, 0], found["counted", 2, 0]
    assert two["responses"] == one["responses"]
    assert two["lengths"][0] != two["lengths"][1]


@pytest.mark.parametrize("case", ["halves", "half adapters"])
def test_bfloat16_computes_above_float32_weights_and_gradients(found, case):
    one, two = found[case, 1, 0], found[case, 2, 0]
    assert two["gradients"] == ["torch.float32"] and two["gathered"] == ["torch.bfloat16"]
    assert two["apart"] < 2 * one["apart"]  # autocast of one process


def test_the_sample_at_fault_is_named_by_all(found):
    for rank in (0, 1):
        case = found["blamed", 2, rank]
        assert case["told"] == found["blamed", 2, 0]["told"] != ""
        assert case["told"].startswith("the first sample at fault is row ") and case["shards"]


def test_a_reward_that_fails_in_one_process_is_told_by_all(found):
    for rank in (0, 1):
        told = found["failing reward", 2, rank]["told"]
        assert told.startswith("objective.reward sharded_training:fails_elsewhere failed (ZeroDivisionError")


def test_the_export_is_that_of_one_process_bit_for_bit(found):
    assert found["exported", 2, 0]["same"] and found["exported", 2, 0]["first"]
    assert not found["exported", 2, 1]["first"]


@pytest.mark.parametrize("world", [2, 4])
def test_no_process_but_the_first_holds_the_model_while_it_is_exported(found, world):
    case = found["peak", world, world - 1]
    assert not case["copy"]
    assert case["peak"] < 1.2 * (case["model"] / world + case["layer"]), case
    assert found["peak", world, 0]["peak"] > case["model"]  # what is measured is what is held


def test_the_loss_of_a_split_head_tells_what_it_must_and_no_more(found):
    """The states of both models, nine numbers a row, and the gradient of the student's states."""
    for rank in (0, 1):
        case = found["joined", 2, rank]
        longest, rows = max(case["rows"]), sum(case["rows"])
        assert case["all_gather"] == [[longest, 32], [longest, 32], [9, rows]]
        assert case["all_reduce"] == [[rows, 32]]
        assert case["head"] == [129 - rank, 32] and case["vocabulary"] == 257
        assert case["held"] <= 0.51 * case["all"]  # of all matrices, the head included


def test_the_sample_at_fault_is_named_where_losses_are_joined(found):
    for rank in (0, 1):
        case = found["blamed together", 2, rank]
        assert case["told"] == f"the first sample at fault is {case['where']} (responses)"


def test_heads_that_processes_cannot_share_are_refused(found):
    told = found["unshared", 3, 2]["told"]
    assert "the 3 processes of a host cannot share the heads of the attention of LlamaForCausalLM" in told
    assert "set parallel.teacher to shard" in told


def test_doctor_validation_and_evaluation_of_a_teacher_in_parts(found):
    one = found["examined", 1, 0]
    assert {"ok", "warning"} >= {one[method]["gradient"] for method in ("kd", "minillm")}
    for case in ("examined", "examined shards"):
        for rank in (0, 1):
            assert {method: found[case, 2, rank][method] for method in ("kd", "minillm")} == {
                method: one[method] for method in ("kd", "minillm")
            }
    for rank in (0, 1):
        assert found["measured", 2, rank]["numbers"] == pytest.approx(found["measured", 1, 0]["numbers"], rel=1e-6)


def test_a_teacher_is_read_into_its_parts(found):
    for rank in (0, 1):
        case = found["read", 2, rank]
        assert case["apart"] <= 1e-12
        assert all(case[f"{where} samples alike"] for where in ("shard", "offload", "tensor"))
        limit = 1.2 * (case["layers"] / 2 + case["outside"] + case["layer"])  # what is outside the layers stays whole
        assert case["shard peak"] < limit and case["offload peak"] < limit, case
        assert case["tensor peak"] < 1.2 * ((case["layers"] + case["outside"]) / 2 + case["layer"]), case


def test_a_checkpoint_of_two_processes_is_resumed_by_one_to_four(found):
    for world in (1, 2, 3, 4):
        assert found["resumed", world, 0]["apart"] <= 1e-12


def test_a_checkpoint_holds_nothing_that_could_run_code(found, folder):
    path = folder / "run" / "checkpoints" / "step-2"
    assert sum(name.startswith("shard-") for name in found["saved", 2, 0]["files"]) == 2
    for file in path.iterdir():
        assert not zipfile.is_zipfile(file), file
        content = file.read_bytes()
        assert not content.startswith(b"\x80"), file
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError, UnicodeDecodeError)):
            pickle.loads(content)


def test_processes_killed_in_a_save_leave_the_checkpoint_before(found):
    case = found["left", 1, 0]
    assert case["whole"] == ["step-2"] and case["hidden"] == 2
    assert case["cleared"] == ["step-2"]


def test_a_disk_that_is_full_for_one_process_is_told_to_all(found):
    for rank in (0, 1):
        case = found["full", 2, rank]
        assert "no checkpoint could be written at step 3" in case["told"] and "No space left" in case["told"]
        assert case["there"] == ["step-2"]


def test_a_student_that_transformers_has_sharded_is_refused(found):
    assert "parallel.student" in found["refused", 2, 1]["told"]
