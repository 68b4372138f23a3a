"""Questions that need an interpreter of their own: the environment, the imports, the threads of a process."""

import os
import subprocess
import sys


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that finds the same packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
