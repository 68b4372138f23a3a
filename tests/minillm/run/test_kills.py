"""SIGKILL at single file operations of a run, before them and in their middle: resumed, each run ends as the one that
nothing happened to. MINILLM_KILLS=200 kills more of them than the few that every run of the tests does."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

TOOLS = Path(__file__).parents[2] / "tools"
KILLS = int(os.environ.get("MINILLM_KILLS", "4"))
TIMED = ("time", "memory/", "step_time", "cpu_time", "tokens_per_second", "seconds")


def left_behind(run):
    """What must not depend on having been killed: everything but clocks and commands."""

    def plain(tree):
        if isinstance(tree, dict):
            return {key: plain(value) for key, value in tree.items() if not key.startswith(TIMED)}
        return tree

    rows = [plain(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = {path.name: plain(json.loads(path.read_text())) for path in (run / "evaluations").iterdir()}
    summary = plain(json.loads((run / "summary.json").read_text()))
    return rows, (run / "samples.jsonl").read_text(), evaluations, summary["changes"], summary["stages"]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
def test_killed_at_any_file_operation_a_run_ends_the_same(files):
    library = files / "kill_at.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, TOOLS / "kill_at.c", "-ldl"], check=True)
    tree = yaml.safe_load((files / "recipe.yaml").read_text())
    del tree["output"], tree["smoke"]
    tree |= {"log": {"checkpoint_every": 1}, "validation": {"every": 1, "greedy_tokens": 4}}
    tree["eval"] |= {"prompts": 2, "samples": 1}
    for stage in tree["stages"].values():
        stage["optim"]["steps"] = 2
    (files / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, TOOLS / "kills.py", library, files / "recipe.yaml", files / "runs", str(KILLS)]
    (files / "runs").mkdir()
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=60 + 30 * KILLS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, *kills = map(json.loads, done.stdout.splitlines())
    assert first["operations"] > 100 and len(kills) == KILLS
    whole = files / "runs" / "whole"
    expected, weights = left_behind(whole), load_file(whole / "model" / "model.safetensors")
    for kill in kills:
        run = files / "runs" / str(kill["run"])
        assert kill["killed"] == -9 and kill["resumed"] == 0, (kill, done.stderr[-3000:])
        assert left_behind(run) == expected, kill
        found = load_file(run / "model" / "model.safetensors")
        assert found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in weights), kill
        hidden = [str(path) for path in run.rglob(".*") if re.fullmatch(r"\..+\.\d+", path.name)]
        assert not hidden, kill
