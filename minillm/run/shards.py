"""The parts of a checkpoint that no process holds whole: by torch.distributed.checkpoint, in safetensors.

Each process writes its shards into a file of its own. They are read back into tensors sharded over any number of
processes, or into whole ones. Inside, a tensor is called GROUP/NAME.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from minillm.files import partial_of, remove
from minillm.parallel.whole import is_shard, local
from minillm.run.verify import CheckpointError, check_finite

Groups = dict[str, dict[str, Tensor]]
PREFIX, FOLDER = "shard-", "shards"


def split(groups: Groups) -> tuple[Groups, dict[str, Tensor]]:
    """The groups without their shards, and these."""
    plain = {name: {k: x for k, x in tensors.items() if not is_shard(x)} for name, tensors in groups.items()}
    parts = {f"{name}/{k}": x for name, tensors in groups.items() for k, x in tensors.items() if is_shard(x)}
    return plain, parts


def check_finite_everywhere(parts: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError in every process where the shards of one are not finite."""
    if not parts:
        return
    found: list[str] = []
    try:
        check_finite({name: local(value) for name, value in parts.items()})
    except CheckpointError as error:
        found.append(str(error))
    if found := gather_object(found):
        raise CheckpointError(found[0])


def write(parts: Mapping[str, Tensor], folder: Path) -> Path | None:
    """Write the shards of all processes into a hidden directory of `folder`, and return its path; None where there are
    none. Every process must call it.

    Raises OSError in all of them where one cannot write.
    """
    if not parts:
        return None
    import torch.distributed.checkpoint as dcp

    target = [partial_of(folder / FOLDER)]  # with the first one's number
    broadcast_object_list(target)
    try:
        dcp.save(
            {name: value.detach() for name, value in parts.items()},
            storage_writer=dcp.HuggingFaceStorageWriter(str(target[0]), save_distributed=True),
        )
    except dcp.CheckpointException as error:
        remove(target[0])
        raise OSError(f"its shards: {next(iter(error.failures.values()))[0]}") from error
    return target[0]


def is_file(name: str) -> bool:
    """Whether a file of a checkpoint holds shards."""
    return name.startswith(PREFIX) and name.endswith(".safetensors")


def described(path: Path, names: Iterable[str]) -> Groups:
    """The tensors whose shards are in a checkpoint's files, on the device `meta`."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    groups: Groups = {}
    files = [name for name in names if is_file(name)]
    if files:
        stored: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        for key in (key for key in stored if "/" in key):  # those of other files have no group in their names
            group, _, name = key.partition("/")
            found = torch.empty(stored[key].size, dtype=stored[key].properties.dtype, device="meta")
            groups.setdefault(group, {})[name] = found
    return groups


def with_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not value.is_meta}


def fill(path: Path, live: Mapping[str, Mapping[str, Tensor]], stored: Groups) -> None:
    """Read the shards in a checkpoint's files into the tensors of the same names that they are of, which may be
    sharded otherwise, or whole. Where there are several processes, every one must call it."""
    import torch.distributed.checkpoint as dcp

    wanted = {
        f"{group}/{name}": value.detach()
        for group, tensors in live.items()
        for name, value in tensors.items()
        if stored[group][name].is_meta
    }
    if wanted:
        alone = not torch.distributed.is_initialized()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant
            dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=alone)
