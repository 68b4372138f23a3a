"""Random cases without end, of the strategies of test_properties.py: python tests/tools/fuzz.py [CASES]

Runs until the log (benchmarks/results/fuzz.json) counts CASES (100,000 by default), and may be stopped and started
again: each batch has a seed of its own and is counted when it has passed. A failure is printed as hypothesis shrinks
it, and the seed that reproduces it stays in the log.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

BATCH = 1000
os.environ["MINILLM_FUZZ_CASES"] = str(BATCH)
sys.path.append(str(Path(__file__).parents[1] / "minillm_kernels"))

import test_properties  # noqa: E402
import torch  # noqa: E402
from hypothesis import seed  # noqa: E402

from minillm_kernels.backends import cpu  # noqa: E402

LOG = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.json"
TESTS = {
    "statistics": test_properties.test_statistics,
    "losses": test_properties.test_losses,
    "samples": test_properties.test_samples,
    "linear": test_properties.test_linear_forms,
}


def main() -> int:
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    log = json.loads(LOG.read_text()) if LOG.exists() else {"cases": 0, "seconds": 0.0, "failed_seeds": []}
    torch.set_num_threads(1)
    sets = [name for name in ("baseline", "avx2", "avx512") if cpu.operations.use_instruction_set(name)]
    while log["cases"] < wanted:
        number = log["cases"] // BATCH
        name = list(TESTS)[number % len(TESTS)]
        instructions = sets[number // len(TESTS) % len(sets)]
        cpu.operations.use_instruction_set(instructions)
        start = time.monotonic()
        try:
            seed(number)(TESTS[name])(core=cpu.operations)
        except AssertionError:
            log["failed_seeds"].append([name, instructions, number])
            LOG.write_text(json.dumps(log, indent=1) + "\n")
            raise
        log["cases"] += BATCH
        log["seconds"] = round(log["seconds"] + time.monotonic() - start, 1)
        for key in (name, instructions):
            log[key] = log.get(key, 0) + BATCH
        LOG.write_text(json.dumps(log, indent=1) + "\n")
        print(f"{log['cases']} cases, {name} on {instructions}: passed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
