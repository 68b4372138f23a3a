"""README.md: its Python runs, its tables are what the committed JSON gives, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_come_from_the_committed_json():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_python_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_files_it_names_exist():
    for path in re.findall(r"`((?:csrc|minillm|minillm_kernels|recipes|benchmarks|examples)/[\w/.-]+\.\w+)`", README):
        assert (ROOT / path).exists() or path.startswith("benchmarks/results/"), path
    assert (ROOT / "recipes" / "smollm2-cpu.yaml").exists()
