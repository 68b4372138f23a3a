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
import time
import traceback
from collections.abc import Callable, Iterable
from unittest import mock

import torch
from accelerate import PartialState
from sharded_checkpoints import full, killed, left, resumed, saved, straight
from sharded_models import BATCH, FOLDER, HSDP, SHARDED, TENSOR, Pair, build, llama, micros_of, optimizer_of
from sharded_tensor import COPIES, blamed_together, examined, joined, measured, unshared
from sharded_training import CASES, COPIED, ON_HOSTS, SHARDABLE, TAUGHT, compared, failing_reward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from minillm.config.parallel import ParallelConfig
from minillm.config.schema import ConfigError
from minillm.data.examples import Batch
from minillm.model.adapters import keep_base_in
from minillm.model.head import CausalLM
from minillm.model.sampling import draw_uniforms
from minillm.parallel import student as parallel
from minillm.parallel.gathered import gathered
from minillm.parallel.shard import place_student, read_teacher
from minillm.parallel.whole import whole, whole_model
from minillm.run import checkpoint
from minillm.train import loop
from minillm.train.context import Context
from minillm.train.loop import METHODS


def counted(where: ParallelConfig) -> dict:
    """All-gathers of a rollout, of a few and of many tokens; responses end at different lengths on the ranks."""
    import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives

    calls, real = [], collectives.DefaultAllGather.__call__
    collectives.DefaultAllGather.__call__ = lambda self, *a, **k: calls.append(1) or real(self, *a, **k)
    found: dict[str, int] = {}
    with mock.patch.object(Context, "ends", tuple(range(60))):
        for tokens in (2, 12):
            context = build("minillm", where, rollout={"max_new_tokens": tokens})
            calls.clear()
            rollout = context.roll_out(0, context.examples[:BATCH], context.teacher, 0.3)
            found[str(tokens)] = len(calls)
    collectives.DefaultAllGather.__call__ = real
    groups = len(list(context.student.model.model.layers)) + 1 + len(list(context.teacher.model.model.layers))
    lengths = [int(rollout.lengths[rank::2].max()) for rank in range(2)]
    return {"all-gathers": found, "groups": groups, "lengths": lengths, "responses": rollout.responses()}


def halves(rank: int = 0) -> dict:
    """Computing in bfloat16 above float32 weights, or adapters of a rank, under autocast or in shards: dtypes, and the
    gradient's distance from that of float32."""
    grads = {}
    for name in ("float32", "bfloat16"):
        context = build("sft", ParallelConfig(), Pair(rank=rank))
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
    original, context = llama(2, 1), build("sft", SHARDED)
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
        batch = Batch.of(context.examples[:4])
        expected = CausalLM(model.requires_grad_(False)).output(batch)
        for where in ("shard", "offload", "tensor"):
            run = dataclasses.replace(
                context.run,
                model=dataclasses.replace(context.run.model, teacher=str(folder)),
                parallel=ParallelConfig(teacher=where),
            )
            with Held() as held:
                lm = read_teacher(run)
            states = lm.output(batch).states
            found["apart"] = max(
                found["apart"],
                float((states - expected.states).abs().max()),
                float((lm.logits(states) - expected.head.logits(expected.states)).abs().max()),
            )
            sampled = []
            for each in (lm, CausalLM(model)):
                with gathered(each):
                    unequal = 0 if where == "tensor" else PartialState().process_index
                    prompts = [example.prompt for example in context.examples[: 2 + unequal]]
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
    model = LlamaForCausalLM.from_pretrained(
        FOLDER / "student", distributed_config=DistributedConfig(fsdp_size=PartialState().num_processes)
    )
    try:
        CausalLM(model)
    except ConfigError as error:
        return {"told": str(error)}
    return {"told": ""}


def whole_or_part(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


ONE = ParallelConfig()
OFFLOADED = ParallelConfig(student="shard", teacher="offload")


def in_world(world: int, where: ParallelConfig, names: Iterable[str], label: str = "") -> list[tuple[str, Callable]]:
    return [(f"{name}{label}", lambda name=name: compared(world, name, where, label)) for name in names]


WORLDS: list[tuple[int, list[tuple[str, Callable]]]] = [  # one after the other: processes, what is run
    (1, [*in_world(1, ONE, CASES), ("counted", lambda: counted(ONE)),
         ("examined", lambda: examined(ONE)), ("measured", lambda: measured(ONE)),
         ("halves", halves), ("half adapters", lambda: halves(2)),
         ("straight", straight)]),
    (
        2,
        [
            *in_world(2, SHARDED, SHARDABLE),
            *in_world(2, OFFLOADED, ["kd"], " offload"),
            *in_world(2, TENSOR, TAUGHT, " tensor"),
            *in_world(2, COPIES, ["minillm", "kd half"], " tensor copies"),
            *in_world(2, ONE, COPIED, " copies"),
            ("counted", lambda: counted(SHARDED)), ("halves", halves), ("half adapters", lambda: halves(2)),
            ("blamed", blamed), ("failing reward", failing_reward), ("gathered", optimised),
            ("exported", exported), ("peak", peak),
            ("joined", joined), ("blamed together", blamed_together), ("measured", lambda: measured(COPIES)),
            ("examined", lambda: examined(COPIES)),
            ("examined shards", lambda: examined(ParallelConfig(teacher="shard"))),
            ("saved", saved), ("refused", refused), ("read", read),
        ],
    ),
    (2, [("resumed", lambda: resumed(SHARDED)), ("full", full)]),
    (2, [("killed", lambda: killed(1))]),
    (2, [("killed", lambda: killed(0))]),
    (1, [("left", left)]),
    (1, [("resumed", lambda: resumed(ONE))]),
    (3, [*in_world(3, SHARDED, SHARDABLE), ("unshared", unshared), ("resumed", lambda: resumed(SHARDED))]),
    (
        4,
        [
            *in_world(4, SHARDED, SHARDABLE),
            *in_world(4, HSDP, SHARDABLE, " 2 x 2"),
            *in_world(4, dataclasses.replace(TENSOR, hosts=2), ON_HOSTS, " tensor 2 x 2"),
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
        begun = time.process_time()
        try:
            found = run()
        except BaseException:
            traceback.print_exc()
            return 1
        if rank in (0, world - 1):
            about = {"world": world, "rank": rank, "case": name, "cpu": round(time.process_time() - begun, 1)}
            os.write(1, (json.dumps(about | found) + "\n").encode())
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
