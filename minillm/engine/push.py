"""How a server gets the student's weights.

By disk, any server that sees the folder reads them. Between GPUs they go by vLLM's weight-transfer engine: over NCCL,
or inside one GPU by CUDA IPC. The server is started with `--weight-transfer-config '{"backend": "nccl"}'` (or "ipc",
then under VLLM_ALLOW_INSECURE_SERIALIZATION=1 too), and vLLM must be importable here. The two have not been run: they
need cards.
"""

import itertools
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minillm.config.engine import EngineConfig
from minillm.config.schema import ConfigError
from minillm.engine.vllm_offline import vllm_unavailable
from minillm.engine.weights import weights_of
from minillm.files import whole_or_absent
from minillm.model.head import CausalLM

if TYPE_CHECKING:
    from minillm.engine.vllm_server import Push, Server


def pusher(lm: CausalLM, config: EngineConfig, dtype: torch.dtype) -> "Push":
    """Hands the weights of `lm`, in `dtype`, to a server."""
    temporary = None if config.folder else tempfile.TemporaryDirectory(prefix="minillm-engine-")
    place = Path(temporary.name if temporary else config.folder) / "student"
    run, count = uuid.uuid4().hex, itertools.count(1)
    transfer: list[Any] = []  # made with the first push, when the server is there

    def by_disk() -> "tuple[str, Callable[[Server], None]]":
        with whole_or_absent(place) as partial:
            partial.mkdir()
            found = weights_of(lm, dtype)  # of which some may share their memory, which no file can say
            weights = {name: value.contiguous().to("cpu", copy=True) for name, value in found.items()}
            save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
            lm.model.config.save_pretrained(partial)
        kwargs = {"weights_path": str(place)}

        def send(server: "Server", kept: object = temporary) -> None:  # which is deleted with what refers to it
            server.ask("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})

        return f"{run}-{next(count)}", send

    def between_gpus() -> "tuple[str, Callable[[Server], None]]":
        def send(server: "Server") -> None:
            if not transfer:
                transfer.append(_transfer(lm, config, dtype, server))
            try:
                transfer[0].send_weights()
            except BaseException:
                transfer.clear()  # it cannot be used again
                raise

        return f"{run}-{next(count)}", send

    return by_disk if config.push == "disk" else between_gpus


class Weights:
    """What vLLM calls a weight source: names and shapes, then the tensors."""

    def __init__(self, lm: CausalLM, dtype: torch.dtype) -> None:
        self.lm, self.dtype = lm, dtype

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(weights_of(self.lm, self.dtype).items())


def _transfer(lm: CausalLM, config: EngineConfig, dtype: torch.dtype, server: "Server") -> Any:
    """vLLM's trainer side, connected with the server."""
    if why := vllm_unavailable():
        raise ConfigError(f"engine.push is {config.push}: {why}")
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    host, _, port = config.address.rpartition(":")
    if config.push == "ipc":
        about: Any = IPCTrainerInitInfo(rank=0)
    else:
        workers = int(server.ask("/get_world_size")["world_size"])
        about = NCCLTrainerInitInfo(master_address=host, master_port=int(port), world_size=workers + 1, rank=0)
    client = HTTPVLLMWeightSyncClient(server.url, timeout=config.timeout)
    return WeightTransferTrainerFactory.trainer_init(about, client=client, source=Weights(lm, dtype))
