"""Processes of a gloo group that stay and do one thing after another, since starting them takes longer than most."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

SECONDS = 60  # for one thing


class World:
    """`size` processes that have imported the module of that name; leave it as a context, and they end."""

    def __init__(self, size: int, module: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([module])
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            forkserver.ensure_running()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.size, self.ends, self.processes = size, [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, size, port), daemon=True)
            process.start()
            self.ends.append(here)
            self.processes.append(process)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """What function(*args) returns on each rank. It can be imported by name there."""
        for end in self.ends:
            end.send((function, args))
        results = []
        for rank, end in enumerate(self.ends):
            assert end.poll(SECONDS), f"rank {rank} of {self.size} did not answer within {SECONDS} s"
            results.append(end.recv())
        errors = [f"rank {rank} of {self.size}:\n{error}" for rank, (_, error) in enumerate(results) if error]
        assert not errors, "\n".join(errors)
        return [result for result, _ in results]


def _serve(end: Any, rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS // 2))
    while True:
        function, args = end.recv()
        try:
            end.send((function(*args), None))
        except BaseException:
            end.send((None, traceback.format_exc()))
