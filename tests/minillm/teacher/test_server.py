"""What a teacher's server promises: who may ask, how much, whose caches make way, and that it says how it is."""

import threading

import pytest
import torch

from minillm.data.examples import collate
from minillm.model.head import CausalLM
from minillm.teacher.sessions import Gone, Sessions
from minillm.teacher.wire import FLOAT8, Question, Refused, pack_states, unpack_states, write_tensors

urllib3 = pytest.importorskip("urllib3", reason="the extra `teach`")
QUESTION = Question.of(collate([[5, 9, 33]], [[6, 7]]))
NAME = "a" * 32


def ask(server, path, tensors=None, **headers):
    body = None if tensors is None else write_tensors(tensors)
    method = "GET" if tensors is None else "POST"
    return urllib3.request(method, server.url + path, body=body, headers=headers, retries=False)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def sampling(prompts=1, tokens=4, length=3):
    return {
        "ids": int32(*[5] * prompts * length),
        "lengths": int32(*[length] * prompts),
        "ends": int32(),
        "uniforms": torch.zeros(tokens * prompts * 2, dtype=torch.float64),
    }


def reading(ids=4, room=4, rows=1):
    exists = torch.ones(rows * room, dtype=torch.uint8)
    return {"ids": int32(*[5] * rows * ids), "exists": exists, "keep": torch.zeros(0, dtype=torch.int64)}


SAMPLE = "/sample?temperature=1&top_k=0&top_p=1&vocab_size=257"
READ = f"/read?wire=float32&session={NAME}&past=0&rows=1"
ROUTES = {
    "/about": None,
    "/head": None,
    "/states?wire=float32": QUESTION._asdict(),
    SAMPLE: sampling(),
    READ: reading(),
}


@pytest.mark.parametrize("path", ROUTES)
def test_nobody_is_answered_without_the_token(serve, path):
    server, tensors = serve(token="secret"), ROUTES[path]
    for headers in ({}, {"authorization": "Bearer secre"}, {"authorization": "secret"}, {"authorization": "Bearer é"}):
        assert ask(server, path, tensors, **headers).status == 401
    assert not server.teacher.sessions.open
    assert ask(server, path, tensors, authorization="Bearer secret").status == 200


def test_health_is_told_to_anybody_even_while_the_model_works(serve):
    server = serve(token="secret")
    output, busy, go_on = server.teacher.lm.output, threading.Event(), threading.Event()
    server.teacher.lm.output = lambda asked: (busy.set(), go_on.wait(20), output(asked))[-1]
    assert ask(server, "/health").json() == {"status": "ok", "model": "tiny", "waiting": 0}
    futures = [server.teacher.worker.submit(QUESTION)]
    assert busy.wait(20)
    futures += [server.teacher.worker.submit(QUESTION) for _ in range(2)]
    assert ask(server, "/health").json()["waiting"] == 2
    go_on.set()
    for future in futures:
        assert future.result(20).shape == (2, 32)


@pytest.mark.parametrize(
    ("path", "tensors", "status", "words"),
    [
        ("/states?wire=float32", QUESTION._asdict(), 413, "5 tokens at once, of at most 4"),
        (SAMPLE, sampling(prompts=2, tokens=1, length=2), 413, "6 tokens at once, of at most 4"),
        (SAMPLE, sampling(tokens=4, length=1), 422, "may have 4 tokens together"),
        (READ.replace("rows=1", "rows=3"), reading(ids=1, room=2, rows=3), 413, "6 tokens at once, of at most 4"),
        (READ, reading(ids=1, room=5), 422, "at most 4 tokens a row"),
        (READ, reading(ids=2, room=1), 422, "room for the ids"),
        (READ.replace(NAME, "../x"), reading(), 422, "a session of 32 hexadecimal digits"),
        (READ.replace("past=0", "past=-1"), reading(), 422, "past of at least 0"),
        (READ.replace("past=0", "past=1"), reading(ids=1, room=0), 409, "no such session"),
        ("/states?wire=float64", QUESTION._asdict(), 422, "wire is 'float64'"),
    ],
)
def test_what_is_too_much_or_wrong_is_refused_with_the_limit(serve, path, tensors, status, words):
    server = serve(request_tokens=4)
    server.teacher.about["longest"] = 5 if path.startswith("/states") else 4
    found = ask(server, path, tensors)
    assert (found.status, words in found.json()["error"]) == (status, True), found.data
    assert not server.teacher.sessions.open


def test_a_body_beyond_the_limit_is_not_read(serve):
    found = ask(serve(request_tokens=4), "/states?wire=float32", {"ids": torch.zeros(1 << 15, dtype=torch.int32)})
    assert found.status == 413 and "bytes" in found.json()["error"]


@torch.no_grad()
def test_the_session_used_least_lately_makes_way(make_llama):
    sessions = Sessions(CausalLM(make_llama(1)), max_tokens=8)
    nothing, room = torch.zeros(0, dtype=torch.long), torch.ones(1, 6, dtype=torch.bool)

    def read(name, past, count):
        return sessions.read(name, past, torch.full((1, count), 5, dtype=torch.int32), room, nothing)

    read("a", 0, 3), read("b", 0, 3), read("a", 3, 1)  # 7 tokens, a the later one
    read("c", 0, 2)
    assert list(sessions.open) == ["a", "c"]
    with pytest.raises(Gone):
        read("b", 3, 1)
    read("d", 0, 6)
    assert list(sessions.open) == ["c", "d"]
    with pytest.raises(Gone):
        read("d", 5, 1)  # not as the client left it
    assert list(sessions.open) == ["c"]  # nor kept for anybody


# ---- what a client believes of an answer


def states(wire, squeezed=False, rows=3):
    return pack_states(torch.randn(rows, 8), wire, squeezed)


@pytest.mark.parametrize(
    ("body", "wire", "squeezed"),
    [
        (states(torch.float32, rows=4), torch.float32, False),
        (states(torch.bfloat16), torch.float32, False),
        (states(torch.float32), FLOAT8, False),
        (states(torch.float32), torch.float32, True),
        (states(torch.bfloat16, True, rows=4), torch.bfloat16, True),
        (states(torch.float32)[:-1], torch.float32, False),
        (b"", torch.float32, False),
        (b"\x80\x04\x95pickled", torch.float32, False),
    ],
)
def test_states_of_another_shape_or_type_are_refused(body, wire, squeezed):
    with pytest.raises(Refused):
        unpack_states(body, wire, torch.float32, (3, 8), squeezed)


def test_states_that_grow_beyond_what_was_asked_are_not_unpacked():
    import zlib

    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(1 << 24))), dtype=torch.uint8)
    body = write_tensors({"exponents": bomb, "mantissas": torch.zeros(24, dtype=torch.uint8)})
    with pytest.raises(Refused, match="25 numbers; expected 24"):  # one more shows it
        unpack_states(body, torch.bfloat16, torch.float32, (3, 8), True)
