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


def test_every_method_and_setting_is_compared(found):
    names = {name for name, *_ in compared(found)}
    assert names >= {
        *METHODS,
        "sft tied",
        "sft packing",
        "sft recompute",
        "sft adapters",
        "minillm alpha 0",
        "offload",
    }
    assert {world for _, world, _ in compared(found)} == {2, 3, 4}
    assert {"minillm 2 x 2", "kd 2 x 2", "sft tied 2 x 2"} <= names


def test_gradients_and_weights_are_those_of_one_process(found):
    for key, case in compared(found).items():
        assert case["sharded"], key
        assert case["gradient"] <= 1e-12, (key, case)
        assert case["weight"] <= 1e-12, (key, case)
        assert case["metric"] <= 1e-6, (key, case)  # which are float32


def test_an_optimiser_of_gathered_weights_is_an_error(found):
    assert found["gathered", 2, 1]["refused"]


def test_norm_and_head_move_as_they_do_in_one_process(found):
    """An optimiser of temporary weights would leave them where they were."""
    for key, case in compared(found).items():
        assert case["moved"] > 1e-3, key


def test_a_rollout_gathers_each_group_once(found):
    case = found["counted", 2, 0]
    assert case["all-gathers"] == {"2": case["groups"], "12": case["groups"]}


def test_bfloat16_computes_above_float32_weights_and_gradients(found):
    one, two = found["halves", 1, 0], found["halves", 2, 0]
    assert two["gradients"] == ["torch.float32"] and two["gathered"] == ["torch.bfloat16"]
    assert two["apart"] < 2 * one["apart"]  # autocast of one process


def test_the_sample_at_fault_is_named_by_all(found):
    for rank in (0, 1):
        case = found["blamed", 2, rank]
        assert case["told"] == found["blamed", 2, 0]["told"] != ""
        assert case["told"].startswith("the first sample at fault is row ") and case["shards"]


def test_the_export_is_that_of_one_process_bit_for_bit(found):
    assert found["exported", 2, 0]["same"] and found["exported", 2, 0]["first"]
    assert not found["exported", 2, 1]["first"]


@pytest.mark.parametrize("world", [2, 4])
def test_no_process_but_the_first_holds_the_model_while_it_is_exported(found, world):
    case = found["peak", world, world - 1]
    assert not case["copy"]
    assert case["peak"] < 1.2 * (case["model"] / world + case["layer"]), case
    assert found["peak", world, 0]["peak"] > case["model"]  # what is measured is what is held


def test_a_tensor_parallel_teacher_teaches_as_one_that_is_whole(found):
    case = found["tensor", 2, 1]
    assert case["minillm"] <= 1e-12 and case["kd"] <= 1e-12
    assert case["held"] < 0.75 * case["all"]


def test_a_checkpoint_of_two_processes_is_resumed_by_one_three_and_four(found):
    for world in (1, 3, 4):
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


def test_a_student_that_transformers_has_sharded_is_refused(found):
    assert "parallel.student" in found["refused", 2, 1]["told"]
