"""Questions that need an interpreter of their own: the environment, the imports, the threads of a process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def in_a_process(code: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that finds the same packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=timeout
    )
