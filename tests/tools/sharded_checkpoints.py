"""The cases of sharded.py that save and resume."""

import errno
import os
import signal

import torch
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from sharded_models import FOLDER, SHARDED, build, optimizer_of, recipe, train

from minillm.config.parallel import ParallelConfig
from minillm.files import remove_partials
from minillm.run import checkpoint
from minillm.run.checkpoint import CheckpointError, Progress


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


def straight() -> dict:
    """A run of four steps that nothing interrupts."""
    context = build("sft", ParallelConfig())
    torch.save(train(context, optimizer_of(context), range(1, 5), FOLDER), FOLDER / "straight.pt")
    return {}


def resumed(where: ParallelConfig) -> dict:
    """The other two, beside those of a run that was not interrupted."""
    context = build("sft", where)
    optimizer = optimizer_of(context)
    found = checkpoint.load(FOLDER / "run" / "checkpoints" / "step-2", recipe(context), context.student.model)
    checkpoint.restore(context.student.model, context.accelerator.prepare(optimizer), context.accelerator, found)
    weights = train(context, optimizer, range(3, 5), FOLDER)
    expected = torch.load(FOLDER / "straight.pt")
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


def full() -> dict:
    """A save during which one process finds no room: all are told, and the checkpoint before stays."""
    context = build("sft", SHARDED)
    optimizer = optimizer_of(context)
    train(context, optimizer, range(1, 2), FOLDER)
    state = checkpoint.state_of(context.student.model, context.accelerator.prepare(optimizer), context.accelerator)

    def no_room(*arguments) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    real, folder = dcp.HuggingFaceStorageWriter.write_data, FOLDER / "run" / "checkpoints"
    if PartialState().process_index == 1:
        dcp.HuggingFaceStorageWriter.write_data = no_room
    try:
        checkpoint.save(folder, recipe(context), Progress("sft", 3), state, context.student.model, 2)
        told = ""
    except CheckpointError as error:
        told = str(error)
    dcp.HuggingFaceStorageWriter.write_data = real
    PartialState().wait_for_everyone()
    return {"told": told, "there": sorted(path.name for path in folder.iterdir())}


def left() -> dict:
    """What such saves left: the checkpoint before, and what the next start clears away."""
    folder = FOLDER / "run" / "checkpoints"
    found = {"whole": sorted(path.name for path in folder.glob("step-*")), "hidden": len(list(folder.glob(".*")))}
    remove_partials(folder)
    return found | {"cleared": sorted(path.name for path in folder.iterdir())}
