"""Servers of a tiny teacher, each in a thread of this process."""

import socket
import threading

import pytest
import torch

from minillm.config.schema import TeacherConfig
from minillm.model.head import CausalLM

QUICK = TeacherConfig(timeout=20.0, patience=1.0)


class Running:
    """A server that listens; `stop` ends it as SIGTERM does, `kill` as a crash: without an answer to anybody."""

    def __init__(self, teacher, port=0):
        import uvicorn

        self.teacher, self.socket = teacher, socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(teacher.app, log_config=None, timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()

    def stop(self):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()

    def kill(self):
        self.server.force_exit = True
        self.stop()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("MINILLM_TEACHER_TOKEN", raising=False)


@pytest.fixture
def serve(make_llama, make_tokenizer):
    """Start a server of a teacher, by default the tiny one of `files`."""
    pytest.importorskip("uvicorn", reason="the extra `teach`")
    from minillm.teacher.server import TeacherServer

    running = []

    def start(model=None, port=0, **settings):
        lm = CausalLM((model or make_llama(4)).requires_grad_(False))
        running.append(Running(TeacherServer(lm, make_tokenizer(), "tiny", **settings), port))
        return running[-1]

    yield start
    for each in running:
        if each.thread.is_alive():
            each.kill()
        if each.teacher.worker.thread.is_alive():
            each.teacher.worker.close()


@pytest.fixture
def ask():
    """Clients of servers, closed at the end."""
    from minillm.teacher.served import ServedTeacher

    clients = []

    def connect(*servers, settings=QUICK):
        clients.append(ServedTeacher([server.url for server in servers], settings, torch.device("cpu")))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()
