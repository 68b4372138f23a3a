"""Runs cases of sharded training in worlds of several processes, and compares them with one process, in float64.

    python tests/tools/sharded.py FOLDER TOKENIZER

One process imports everything and forks the ranks of each world in turn, so that imports are paid once. What each case
found is a line of JSON; tests/minillm/parallel/ says what it must be.
"""

import dataclasses
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, PartialState
from transformers import LlamaConfig, LlamaForCausalLM

from minillm.config.parallel import ParallelConfig
from minillm.config.recipe import Recipe, stage_from
from minillm.config.schema import ConfigError, LoraConfig, RunConfig
from minillm.data.examples import Example, Record
from minillm.files import remove_partials
from minillm.model.adapters import add_adapters
from minillm.model.head import CausalLM
from minillm.model.layers import recompute_layers
from minillm.model.load import load_model, load_tokenizer
from minillm.parallel import student as parallel
from minillm.parallel.gathered import gathered
from minillm.parallel.shard import is_sharded, place_student, place_teacher
from minillm.parallel.tensor import teacher_loader
from minillm.parallel.whole import whole, whole_model
from minillm.run import checkpoint
from minillm.run.checkpoint import Progress
from minillm.train import loop
from minillm.train.context import Context, chunks
from minillm.train.loop import METHODS, Micro
from minillm.train.optimizers import make_optimizer

FOLDER, TOKENIZER = Path(sys.argv[1]), sys.argv[2]
V, BATCH = 257, 12
SHARDED = ParallelConfig(student="shard", teacher="shard")
HSDP = ParallelConfig(student="shard", teacher="shard", hosts=2)


def llama(layers: int, seed: int, tied: bool = False, hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=hidden, intermediate_size=3 * hidden // 2, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().double()


def build(
    method: str, where: ParallelConfig, tied=False, packing=False, recompute=False, rank=0, **sections
) -> Context:
    """A stage with its models in place."""
    config = stage_from(
        {
            "method": method,
            "data": {"train": "x", "packing": packing, "max_prompt_length": 16, "max_response_length": 16},
            "rollout": {"batch_size": BATCH, "max_new_tokens": 6, "epochs": 3, "alpha": 0.3, "on_policy": 0.6},
            "objective": {"pt_batch_size": BATCH, "pt_length": 5, "pt_teacher": 0.5},
            "optim": {"batch_size": BATCH, "micro_batch_size": 2, "lr": 1e-2, "max_grad_norm": 0.5, "steps": 4},
            "validation": {"every": 0},
            **sections,
        }
    )
    student, teacher = llama(3, 1, tied), llama(4, 2).requires_grad_(False)
    if rank:
        add_adapters(student, LoraConfig(rank=rank), 0)
        student.double()
    if recompute:
        recompute_layers(student)
    pair = CausalLM(student), CausalLM(teacher)
    tokenizer = load_tokenizer(TOKENIZER)
    drawn = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, V, (2 + i % 5,), generator=drawn).tolist() for i in range(24)]
    examples = [Example(Record([], None, f"row {i}"), p, [*p[::-1], 0]) for i, p in enumerate(prompts)]
    text = [torch.randint(1, V, (5,), generator=drawn).tolist() for _ in range(24)]
    run = RunConfig(parallel=where)
    context = Context(run, config, Accelerator(cpu=True), *pair, tokenizer, examples, examples[:5], text)
    place_teacher(pair[1], where)
    place_student(pair[0], where, torch.float32)
    return context


def micros_of(context: Context, method, number: int) -> list[Micro]:
    return [
        Micro(part, part.batch(examples))
        for part in method.step(number).parts
        for examples in chunks(part.examples, context.config.optim.micro_batch_size)
    ]


def train(context: Context, optimizer, steps: range, folder: Path) -> dict[str, torch.Tensor]:
    """Metrics and gradients of each step, and the weights after the last."""
    predictor, wrapped = parallel.prepare(context.student, optimizer, context.accelerator)
    method, model, found = METHODS[context.config.method](context, folder), context.student.model, {}
    for number in steps:
        sums = loop.backward(context, predictor, micros_of(context, method, number))
        found |= {f"{number} metric {name}": value.double() for name, value in sums.items()}
        for name, parameter in checkpoint.trained(model).items():
            found[f"{number} gradient {name}"] = whole(parameter.grad).clone()
        norm = context.accelerator.clip_grad_norm_(checkpoint.trained(model).values(), 0.5)
        found[f"{number} metric norm"] = whole(norm).double()
        wrapped.step()
        wrapped.zero_grad()
        parallel.to_step(context.student)  # shards after every step
    return found | {f"weight {name}": whole(p.detach()).clone() for name, p in model.named_parameters()}


def optimizer_of(context: Context) -> torch.optim.Optimizer:
    return make_optimizer(context.config.optim, parallel.to_step(context.student))


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


def halves() -> dict:
    """Computing in bfloat16 above float32 weights, under autocast or in shards: dtypes, and the gradient's distance
    from that of float32."""
    grads = {}
    for name in ("float32", "bfloat16"):
        context = build("sft", ParallelConfig())
        context.student.float()
        run = context.run
        context.run = dataclasses.replace(run, model=dataclasses.replace(run.model, compute_dtype=name))
        place_student(context.student, SHARDED, context.compute_dtype)
        loop.backward(context, context.student, micros_of(context, METHODS["sft"](context, FOLDER), 1))
        grads[name] = {n: whole(p.grad) for n, p in context.student.model.named_parameters()}
        with gathered(context.student):
            inside = {str(p.dtype) for p in context.student.parameters()}
    apart = [float((grads["bfloat16"][n] - g).norm() / g.norm()) for n, g in grads["float32"].items()]
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


def saved() -> dict:
    """Two steps of four, and a checkpoint."""
    context = build("sft", SHARDED)
    optimizer = optimizer_of(context)
    train(context, optimizer, range(1, 3), FOLDER)
    state = checkpoint.state_of(context.student.model, context.accelerator.prepare(optimizer), context.accelerator)
    folder = FOLDER / "run" / "checkpoints"
    path = checkpoint.save(folder, recipe(context), Progress("sft", 2), state, context.student.model, 2)
    PartialState().wait_for_everyone()
    return {"files": sorted(each.name for each in path.iterdir())}


def resumed(world: int, where: ParallelConfig) -> dict:
    """The other two, beside those of a run that was not interrupted."""
    context = build("sft", where)
    optimizer = optimizer_of(context)
    found = checkpoint.load(FOLDER / "run" / "checkpoints" / "step-2", recipe(context), context.student.model)
    checkpoint.restore(context.student.model, context.accelerator.prepare(optimizer), context.accelerator, found)
    weights = train(context, optimizer, range(3, 5), FOLDER)
    straight = FOLDER / "straight.pt"
    if not straight.exists() and world == 1:
        whole_run = build("sft", ParallelConfig())
        torch.save(train(whole_run, optimizer_of(whole_run), range(1, 5), FOLDER), straight)
    expected = torch.load(straight)
    compared = [key for key in weights if " metric " not in key]
    return {"apart": max(float((weights[key] - expected[key]).abs().max()) for key in compared)}


def killed(rank: int) -> dict:
    """A save during which a process dies by signal 9: one that writes its shards, or the first, before the end."""
    context = build("sft", SHARDED)
    optimizer = optimizer_of(context)
    train(context, optimizer, range(1, 2), FOLDER)
    state = checkpoint.state_of(context.student.model, context.accelerator.prepare(optimizer), context.accelerator)

    def die(*arguments) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if PartialState().process_index == rank:
        if rank:
            dcp.HuggingFaceStorageWriter.write_data = die
        else:
            checkpoint.write_manifest = die
    folder = FOLDER / "run" / "checkpoints"
    checkpoint.save(folder, recipe(context), Progress("sft", 3), state, context.student.model, 2)
    PartialState().wait_for_everyone()
    return {}


def left() -> dict:
    """What such saves left: the checkpoint before, and what the next start clears away."""
    folder = FOLDER / "run" / "checkpoints"
    found = {"whole": sorted(path.name for path in folder.glob("step-*")), "hidden": len(list(folder.glob(".*")))}
    remove_partials(folder)
    return found | {"cleared": sorted(path.name for path in folder.iterdir())}


def peak() -> dict:
    """Most bytes of tensors that a process holds while a student is exported, beside what the model has."""
    from torch.distributed._tools.mem_tracker import MemTracker

    context = build("sft", ParallelConfig())
    model = llama(8, 1, hidden=128).float()
    weights = {name: p.nbytes for name, p in model.named_parameters()}
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
    context.student = CausalLM(model)
    place_student(context.student, SHARDED, torch.float32)
    tracker = MemTracker()
    tracker.track_external(context.student)
    with tracker:
        copy = whole_model(context.student)
    found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return {"peak": int(found), "model": sum(weights.values()), "layer": max(layers), "copy": copy is not None}


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


def recipe(context: Context) -> Recipe:
    return Recipe("sharded", context.run, {"sft": context.config})


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


def whole_or_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


WORLDS = [  # one after the other: processes, what is run
    (1, [*((name, lambda name=name: compared(1, name, ParallelConfig())) for name in CASES), ("halves", halves)]),
    (
        2,
        [
            *((name, lambda name=name: compared(2, name, SHARDED)) for name in CASES),
            ("offload", lambda: compared(2, "kd", ParallelConfig(student="shard", teacher="offload"), "o")),
            ("counted", counted), ("halves", halves), ("blamed", blamed), ("gathered", optimised),
            ("exported", exported), ("peak", peak),
            ("tensor", together), ("saved", saved), ("refused", refused),
        ],
    ),
    (2, [("killed", lambda: killed(1))]),
    (2, [("killed", lambda: killed(0))]),
    (1, [("left", left)]),
    (1, [("resumed", lambda: resumed(1, ParallelConfig()))]),
    (
        3,
        [
            *((name, lambda name=name: compared(3, name, SHARDED)) for name in FEW),
            ("resumed", lambda: resumed(3, SHARDED)),
        ],
    ),
    (
        4,
        [
            *((name, lambda name=name: compared(4, name, SHARDED)) for name in FEW),
            *((f"{name} 2 x 2", lambda name=name: compared(4, name, HSDP, "h")) for name in FEW),
            ("resumed", lambda: resumed(4, HSDP)), ("peak", peak),
        ],
    ),
]  # fmt: skip


def rank_of_world(rank: int, world: int, cases) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
    PartialState(cpu=True)
    only = os.environ.get("ONLY")
    for name, run in cases:
        if only and world > 1 and name not in only.split(","):
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
