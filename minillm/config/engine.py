"""The section `engine`: where the engines are that sample in place of our own decoder."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """Engines of vLLM, for stages with rollout.engine `vllm` and evaluations with eval.engine `vllm`. Each model that
    samples has one: in this process, or a server."""

    url: str = ""
    """Of a server (`vllm serve`) that holds the student, such as http://localhost:8000, and is given its weights
    before each rollout; empty: an engine in this process."""
    teacher_url: str = ""
    """The same for the teacher, which keeps the weights that it was started with."""
    push: str = "disk"
    """How a server gets the student's weights: `disk`, by a file in `folder`; `nccl`, between GPUs; `ipc`, inside one
    GPU."""
    folder: str = ""
    """disk: a folder that trainer and server both see, under one path; empty: a temporary one of this machine."""
    address: str = "127.0.0.1:29600"
    """nccl: HOST:PORT of this trainer, as the server reaches it."""
    memory: float = 4.0
    """GiB of key-value cache of each engine in this process."""
    sleep: bool = True
    """Engines in this process give their GPU memory back between rollouts."""
    timeout: float = 600.0
    """Seconds after which an answer of a server no longer comes."""
    retries: int = 10
    """How often a request that failed is sent again, after 1, 2, 4, … seconds, at most 30."""
