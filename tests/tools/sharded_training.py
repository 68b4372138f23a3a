"""Three steps of each method and setting in a world of several processes, beside one process."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from sharded_models import FOLDER, Pair, build, optimizer_of, train

from minillm.config.parallel import ParallelConfig
from minillm.config.schema import ConfigError
from minillm.model.head import CausalLM
from minillm.parallel.shard import is_sharded
from minillm.parallel.tensor import runs_together
from minillm.parallel.whole import whole
from minillm.train.loop import METHODS

WIDE = {"rows": 263, "tied": True}
CASES: dict[str, dict[str, Any]] = {  # the settings of `build`
    "sft tied packing": {"method": "sft", "pair": Pair(tied=True), "packing": True},
    "sft recompute": {"method": "sft", "pair": Pair(recompute=True)},
    "sft adapters": {"method": "sft", "pair": Pair(rank=2)},
    "kd": {"method": "kd"},
    "kd packing": {"method": "kd", "packing": True},
    "kd wide teacher": {"method": "kd", "pair": Pair(tied=True, teacher=WIDE)},
    "kd several": {"method": "kd", "pair": Pair(several=True)},
    "seqkd": {"method": "seqkd"},
    "gkd": {"method": "gkd", "loss": {"divergence": "jsd"}},
    "kd half": {"method": "kd", "pair": Pair(half=True), "optim": {"micro_batch_size": 1}},
    "minillm": {"method": "minillm"},
    "minillm half": {
        "method": "minillm", "pair": Pair(half=True), "rollout": {"chunk_size": 1}, "optim": {"micro_batch_size": 1},
    },
    "minillm tied": {"method": "minillm", "pair": Pair(tied=True, recompute=True)},
    "minillm adapters": {"method": "minillm", "pair": Pair(rank=2)},
    "minillm alpha 0": {"method": "minillm", "rollout": {"alpha": 0.0}},
    "minillm coins": {"method": "minillm", "rollout": {"coins": 2}},
    "minillm reward": {"method": "minillm", "objective": {"reward": "sharded_training:shorter", "reward_coef": 0.5}},
    "minillm overlap": {"method": "minillm", "rollout": {"overlap": 1, "epochs": 1}},
}  # fmt: skip
COPIED = [name for name in CASES if "several" in name or "overlap" in name or "half" in name]
"""What needs a student that is whole on every process: in 16 bits to be computed as one process does."""
TAUGHT = [name for name in CASES if not (name in COPIED or name.startswith("sft"))]
ON_HOSTS = ["kd", "seqkd", "gkd", "minillm", "minillm alpha 0"]
SHARDABLE = [name for name in CASES if name not in (*COPIED, "minillm coins", "kd wide teacher")]


def shorter(prompts: Sequence, responses: Sequence[str], records: Sequence) -> list[float]:
    """A reward of a task."""
    return [1.0 / (1 + len(response)) for response in responses]


def fails_elsewhere(prompts: Sequence, responses: Sequence[str], records: Sequence) -> list[float]:
    """One that the last process cannot compute."""
    state = PartialState()
    return [1.0 / (state.num_processes - 1 - state.process_index) for _ in responses]


def failing_reward() -> dict:
    """What each process says of a reward that fails on one of them."""
    context = build("minillm", ParallelConfig(), objective={"reward": "sharded_training:fails_elsewhere"})
    try:
        METHODS["minillm"](context, FOLDER).step(1)
    except ConfigError as error:
        return {"told": str(error)}
    return {"told": ""}


def compared(world: int, name: str, where: ParallelConfig, label: str = "") -> dict:
    """Largest error of each kind, relative to the largest number of its tensor in one process."""
    context = build(where=where, **CASES[name])
    before = {n: whole(p.detach()).clone() for n, p in context.student.model.named_parameters()}
    found = train(context, optimizer_of(context), range(1, 4), FOLDER / f"{name} {world}{label}".replace(" ", "-"))
    file = FOLDER / f"{name}.pt"
    if world == 1:
        torch.save(found, file)
        return {}
    expected, worst = torch.load(file), {}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        kind = key.split()[0] if key.startswith("weight") else key.split()[1]
        apart = float((found[key] - value).abs().max() / value.abs().max().clamp(min=1e-3))
        worst[kind] = max(worst.get(kind, 0.0), apart)
        if key.startswith("1 gradient"):
            worst["first gradient"] = max(worst.get("first gradient", 0.0), apart)
    ends = [n for n in before if n.endswith(("model.norm.weight", "embed_tokens.weight", "lm_head.weight"))]
    moved = min(float((found[f"weight {n}"] - before[n]).abs().max()) for n in ends) if "adapters" not in name else 1.0
    student = "shard" if is_sharded(context.student) else "replicate"
    return {**worst, "moved": moved, "student": student, "teacher": placed(context.teacher)}


def placed(teacher: CausalLM | None) -> str:
    if runs_together(teacher):
        return "tensor"
    return "shard" if is_sharded(teacher) else "replicate"
