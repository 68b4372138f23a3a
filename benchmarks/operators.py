"""What the host dispatches for a token of a rollout, without CUDA graphs and with them.

The demo pair, on a CPU, where a graph is a recording that is replayed (tests/tools/recorded.py). Two rollouts of
different length differ by tokens alone: by their difference each operator of a token is counted, and nothing else.

    PYTHONPATH=tests/tools python benchmarks/operators.py          # a minute; benchmarks/results/operators.json
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from recorded import Count, Recorded

from minillm.config.recipe import load_recipe
from minillm.distillation import load_pair
from minillm.files import write_atomically
from minillm.model import places
from minillm.model.coins import share_coins
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.model.static import takes_graphs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "operators.json"
PROMPTS, SHORT, LONG = [[5, 9, 17, 33, 2], [7], [100, 3, 45]], 4, 8


def main() -> None:
    student, teacher, _ = load_pair(load_recipe(ROOT / "recipes" / "smollm2-cpu.yaml", []).run)
    assert takes_graphs(student) and takes_graphs(teacher)  # tried here, once
    places.Replayed = Recorded
    ways = {"student": (None, 0.0, False), "both": (teacher, 0.2, False), "coins_first": (teacher, 0.2, True)}
    rows = {}
    for name, (beside, alpha, first) in ways.items():
        found = []
        for graphs in (False, True):
            counts = []
            for limit in (SHORT, LONG):
                uniforms = share_coins(draw_uniforms(0, limit, len(PROMPTS)), 1)
                uniforms[..., 0] = 0.9 if first else uniforms[..., 0]  # the teacher's turns are not of every token
                with Count() as count:
                    decoding = Decoding(limit, (), coins_first=first, graphs=graphs)
                    sample(student, beside, PROMPTS, decoding, alpha=alpha, uniforms=uniforms)
                counts.append(count.found)
            found.append((counts[1] - counts[0]) / (LONG - SHORT))
        held = sum(len(each.calls) for each in Recorded.made[-2:])
        rows[name] = {"launched": found[0], "replayed": found[1], "held": held}
    result = {"command": "python benchmarks/operators.py", "torch_version": torch.__version__, "rows": rows}
    write_atomically(RESULTS, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
