"""`python -m benchmarks.gpu` runs to its end without a card: no error, nothing wrong."""

import json
import subprocess
import sys
from pathlib import Path


def test_dry(tmp_path):
    out = tmp_path / "dry.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(out)]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {x["section"] for x in lines} == {"env", "ceilings", "correct", "rows", "linear", "host"}
    assert "0 wrong; 0 errors" in result.stdout
