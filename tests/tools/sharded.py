"""Runs cases of sharded training in worlds of several processes, and compares them with one process, in float64.

    FIRST_PORT=29500 python tests/tools/sharded.py FOLDER TOKENIZER

WORLDS=1,2 and ONLY=CASE,CASE choose some of it.

One process imports everything and forks the ranks of each world in turn, so that imports are paid once. What each case
found is a line of JSON; tests/minillm/parallel/ says what it must be.
"""

import dataclasses
import json
import os
import sys
import traceback

import torch
from accelerate import PartialState
from sharded_checkpoints import full, killed, left, resumed, saved, straight
from sharded_models import (
    BATCH,
    FOLDER,
    HSDP,
    SHARDED,
    build,
    llama,
    micros_of,
    optimizer_of,
    train,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.config.parallel import ParallelConfig
from minillm.config.schema import ConfigError
from minillm.model.adapters import keep_base_in
from minillm.model.head import CausalLM
from minillm.model.load import load_model
from minillm.model.sampling import draw_uniforms
from minillm.parallel import student as parallel
from minillm.parallel.gathered import gathered
from minillm.parallel.shard import is_sharded, place_student, read_teacher
from minillm.parallel.tensor import teacher_loader
from minillm.parallel.whole import whole, whole_model
from minillm.run import checkpoint
from minillm.train import loop
from minillm.train.loop import METHODS

CASES = {  # the settings of `build`
    "sft": {"method": "sft"},
    "sft tied": {"method": "sft", "tied": True},
    "sft packing": {"method": "sft", "packing": True},
    "sft recompute": {"method": "sft", "recompute": True},
    "sft adapters": {"method": "sft", "rank": 2},
    "kd": {"method": "kd"},
    "seqkd": {"method": "seqkd"},
    "gkd": {"method": "gkd"},
    "minillm": {"method": "minillm"},
    "minillm tied": {"method": "minillm", "tied": True},
    "minillm alpha 0": {"method": "minillm", "rollout": {"batch_size": BATCH, "max_new_tokens": 6, "alpha": 0.0}},
}
FEW = ("sft tied", "kd", "minillm")


def compared(world: int, name: str, where: ParallelConfig, label: str = "") -> dict:
    """Largest error of each kind, relative to the largest number of its tensor in one process."""
    context, folder = build(where=where, **CASES[name]), FOLDER / f"{name} {world}{label}".replace(" ", "-")
    before = {n: whole(p.detach()).clone() for n, p in context.student.model.named_parameters()}
    found = train(context, optimizer_of(context), range(1, 4), folder)
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
    ends = [n for n in before if n.endswith(("model.norm.weight", "embed_tokens.weight", "lm_head.weight"))]
    moved = min(float((found[f"weight {n}"] - before[n]).abs().max()) for n in ends) if "adapters" not in name else 1.0
    return {**worst, "moved": moved, "sharded": is_sharded(context.student) and is_sharded(context.teacher)}


# ---- other subjects


def counted() -> dict:
    """All-gathers of a rollout, of a few and of many tokens; responses end at different lengths on the ranks."""
    import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives

    calls, real = [], collectives.DefaultAllGather.__call__
    collectives.DefaultAllGather.__call__ = lambda self, *a, **k: calls.append(1) or real(self, *a, **k)
    found, lengths = {}, []
    for tokens in (2, 12):
        context = build("minillm", SHARDED, rollout={"batch_size": BATCH, "max_new_tokens": tokens})
        calls.clear()
        rollout = context.roll_out(0, context.examples[:BATCH], context.teacher, 0.3)
        found[str(tokens)] = len(calls)
        lengths = [int(rollout.lengths[rank::2].max()) for rank in range(2)]
    collectives.DefaultAllGather.__call__ = real
    groups = len(list(context.student.model.model.layers)) + 1 + len(list(context.teacher.model.model.layers))
    return {"all-gathers": found, "groups": groups, "lengths": lengths}


def halves(rank: int = 0) -> dict:
    """Computing in bfloat16 above float32 weights, or adapters of a rank, under autocast or in shards: dtypes, and the
    gradient's distance from that of float32."""
    grads = {}
    for name in ("float32", "bfloat16"):
        context = build("sft", ParallelConfig(), rank=rank)
        context.student.float()
        run = context.run
        context.run = dataclasses.replace(run, model=dataclasses.replace(run.model, compute_dtype=name))
        keep_base_in(context.student.model, context.compute_dtype)
        place_student(context.student, SHARDED, context.compute_dtype)
        loop.backward(context, context.student, micros_of(context, METHODS["sft"](context, FOLDER), 1))
        grads[name] = {n: whole(p.grad) for n, p in checkpoint.trained(context.student.model).items()}
        with gathered(context.student):
            inside = {str(p.dtype) for p in context.student.parameters()}
    apart = [
        float((grads["bfloat16"][n] - g).norm() / g.norm()) for n, g in grads["float32"].items() if g.any()
    ]  # half of an adapter has no gradient at first
    kinds = {str(g.dtype) for g in grads["bfloat16"].values()}
    return {"apart": max(apart), "gradients": sorted(kinds), "gathered": sorted(inside)}


def blamed() -> dict:
    """Which example is named; on one rank alone, and each rank has looked at all of its own."""
    context = build("kd", SHARDED)
    method = METHODS["kd"](context, FOLDER)
    parts = method.step(1).parts
    if context.accelerator.process_index == 1:
        bad = parts[0].examples[2]

        def loss(student, batch, real=parts[0].loss):
            sums = real(student, batch)
            mine = batch.input_ids[0, : len(bad.prompt)].tolist() == bad.prompt
            return {**sums, "loss": sums["loss"] * (float("nan") if mine else 1.0)}

        parts = [parts[0]._replace(loss=loss)]
    told = loop.blame(context, parts)
    everything = PartialState()
    return {"told": told, "rank": everything.process_index, "shards": bool(parallel.to_step(context.student))}


def optimised() -> dict:
    """An optimiser made where the student is gathered."""
    context = build("sft", SHARDED)
    with gathered(context.student):
        try:
            optimizer_of(context)
        except AssertionError:
            return {"refused": True}
    return {"refused": False}


def exported() -> dict:
    """The copy that is saved, beside the model before it was sharded."""
    original, context = llama(3, 1), build("sft", SHARDED)
    copy = whole_model(context.student)
    found = {"first": copy is not None}
    if copy is not None:
        ours, theirs = copy.state_dict(), original.state_dict()
        found["same"] = ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    return found


class Held(TorchDispatchMode):
    """The most bytes that were held at once by tensors that an operator has read or made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, found)):
            if isinstance(leaf, torch.Tensor):
                storage = whole_or_part(leaf).untyped_storage()
                if storage.device.type == "cpu":
                    self.known.setdefault(storage._cdata, StorageWeakRef(storage))
        held = 0
        for key, reference in list(self.known.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self.known[key]
            else:
                held += storage.nbytes()
        self.peak = max(self.peak, held)
        return found


def peak() -> dict:
    """Most bytes of tensors that a process holds while a student is exported, beside what the model has."""
    context = build("sft", ParallelConfig())
    model = llama(8, 1, hidden=128).float()
    weights = {name: p.nbytes for name, p in model.named_parameters()}
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
    context.student = CausalLM(model)
    place_student(context.student, SHARDED, torch.float32)
    with Held() as held:
        copy = whole_model(context.student)
    return {"peak": held.peak, "model": sum(weights.values()), "layer": max(layers), "copy": copy is not None}


def read() -> dict:
    """A teacher that is read into its shards, tied or not: its states and log-probs, beside one that is whole, and the
    most bytes that this process held meanwhile."""
    found: dict = {"apart": 0.0}
    for tied in (False, True):
        folder, model = FOLDER / f"read-{tied}", llama(8, 2, tied, hidden=128)
        if PartialState().is_main_process:
            model.save_pretrained(folder, max_shard_size="500KB")
        PartialState().wait_for_everyone()
        context = build("kd", ParallelConfig())
        batch = micros_of(context, METHODS["kd"](context, FOLDER), 1)[0].batch
        expected = CausalLM(model.requires_grad_(False)).output(batch)
        for where in ("shard", "offload"):
            run = dataclasses.replace(
                context.run,
                model=dataclasses.replace(context.run.model, teacher=str(folder)),
                parallel=ParallelConfig(teacher=where),
            )
            with Held() as held:
                lm = read_teacher(run)
            states, head = lm.output(batch)
            found["apart"] = max(
                found["apart"],
                float((states - expected.states).abs().max()),
                float((head.logits(states) - expected.head.logits(expected.states)).abs().max()),
            )
            sampled = []
            for each in (lm, CausalLM(model)):
                with gathered(each):
                    prompts = [example.prompt for example in context.examples[: 2 + PartialState().process_index]]
                    uniforms = draw_uniforms(1, 6, len(prompts))
                    sampled.append(context.sample_responses(each, None, prompts, uniforms, 0.0).responses())
            found[f"{where} samples alike"] = sampled[0] == sampled[1]
            found[f"{where} peak"] = held.peak
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
    outside = sum(p.nbytes for p in llama(8, 2, hidden=128).parameters()) - sum(layers)
    return found | {"layers": sum(layers), "layer": max(layers), "outside": outside}


def refused() -> dict:
    """A student that transformers has sharded."""
    from transformers.distributed import DistributedConfig

    if PartialState().is_main_process:
        llama(2, 2).save_pretrained(FOLDER / "student")
    PartialState().wait_for_everyone()
    model = load_model(str(FOLDER / "student"), distributed=DistributedConfig(fsdp_size=PartialState().num_processes))
    try:
        CausalLM(model)
    except ConfigError as error:
        return {"told": str(error)}
    return {"told": ""}


def together() -> dict:
    """A tensor-parallel teacher: its states and a step of MiniLLM, beside one that is whole."""
    if PartialState().is_main_process:
        llama(4, 2).save_pretrained(FOLDER / "teacher")
    PartialState().wait_for_everyone()
    where, found = ParallelConfig(student="shard", teacher="tensor"), {}
    for method in ("minillm", "kd"):
        context = build(method, ParallelConfig(student="shard"))
        model = teacher_loader(where)(str(FOLDER / "teacher"), "checkpoint", "auto").requires_grad_(False)
        context.teacher, context.run = CausalLM(model), dataclasses.replace(context.run, parallel=where)
        steps = train(context, optimizer_of(context), range(1, 4), FOLDER / "together")
        expected = torch.load(FOLDER / f"{method}.pt")
        found[method] = max(
            float((steps[k] - v).abs().max() / v.abs().max().clamp(min=1e-3))
            for k, v in expected.items()
            if " metric " not in k
        )
        found["held"] = sum(whole_or_part(p).numel() for p in model.parameters())
        found["all"] = sum(p.numel() for p in model.parameters())
    return found


def whole_or_part(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


WORLDS = [  # one after the other: processes, what is run
    (1, [*((name, lambda name=name: compared(1, name, ParallelConfig())) for name in CASES), ("halves", halves),
         ("half adapters", lambda: halves(2)), ("straight", straight)]),
    (
        2,
        [
            *((name, lambda name=name: compared(2, name, SHARDED)) for name in CASES),
            ("offload", lambda: compared(2, "kd", ParallelConfig(student="shard", teacher="offload"), "o")),
            ("counted", counted), ("halves", halves), ("half adapters", lambda: halves(2)),
            ("blamed", blamed), ("gathered", optimised),
            ("exported", exported), ("peak", peak),
            ("tensor", together), ("saved", saved), ("refused", refused), ("read", read),
        ],
    ),
    (2, [("resumed", lambda: resumed(SHARDED)), ("full", full)]),
    (2, [("killed", lambda: killed(1))]),
    (2, [("killed", lambda: killed(0))]),
    (1, [("left", left)]),
    (1, [("resumed", lambda: resumed(ParallelConfig()))]),
    (
        3,
        [
            *((name, lambda name=name: compared(3, name, SHARDED)) for name in FEW),
            ("resumed", lambda: resumed(SHARDED)),
        ],
    ),
    (
        4,
        [
            *((name, lambda name=name: compared(4, name, SHARDED)) for name in FEW),
            *((f"{name} 2 x 2", lambda name=name: compared(4, name, HSDP, "h")) for name in FEW),
            ("resumed", lambda: resumed(HSDP)), ("peak", peak),
        ],
    ),
]  # fmt: skip


def rank_of_world(rank: int, world: int, cases) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
    PartialState(cpu=True)
    only = os.environ.get("ONLY")
    for name, run in cases:
        if only and name not in only.split(","):
            continue
        try:
            found = run()
        except BaseException:
            traceback.print_exc()
            return 1
        if rank in (0, world - 1):
            os.write(1, (json.dumps({"world": world, "rank": rank, "case": name, **found}) + "\n").encode())
    if world > 1:
        torch.distributed.destroy_process_group()
    return 0


def main() -> int:
    torch.set_num_threads(1)
    for number, (world, cases) in enumerate(WORLDS):
        if os.environ.get("WORLDS") and str(world) not in os.environ["WORLDS"].split(","):
            continue
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(int(os.environ["FIRST_PORT"]) + number)}
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os._exit(rank_of_world(rank, world, cases))
            children.append(child)
        ended = [os.waitpid(child, 0)[1] for child in children]
        if any(ended) and "killed" not in dict(cases):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
