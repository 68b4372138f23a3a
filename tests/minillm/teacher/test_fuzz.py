"""Whatever is sent to a teacher's server, it answers by a clear 4xx, and answers others afterwards."""

import json
import socket

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm.data.examples import collate
from minillm.teacher.wire import Question, write_tensors

urllib3 = pytest.importorskip("urllib3", reason="the extra `teach`")
GOOD = write_tensors(Question.of(collate([[5, 9, 33]], [[6, 7]]))._asdict())
DTYPES = [torch.int32, torch.int64, torch.float32, torch.uint8, torch.bool, torch.bfloat16]
numbers = st.lists(st.one_of(st.integers(-3, 300), st.sampled_from([2**31 - 1, -(2**31)])), max_size=6)
names = st.sampled_from(["ids", "lengths", "positions", "ends", "uniforms", "exists", "keep", "", "__metadata__x"])


@st.composite
def tensors(draw):
    """A safetensors file of right names, and of types and numbers that may be wrong."""
    usual = draw(st.sampled_from([("lengths", "positions"), ("lengths", "ends", "uniforms"), ("exists", "keep")]))
    found = {name: draw(numbers) for name in ("ids", *usual)}
    found |= draw(st.dictionaries(names, numbers, max_size=2))
    right = {"ids": torch.int32, "lengths": torch.int32, "positions": torch.int64, "uniforms": torch.float64,
             "exists": torch.uint8, "keep": torch.int64}  # fmt: skip
    types = {n: right.get(n, torch.int32) if draw(st.booleans()) else draw(st.sampled_from(DTYPES)) for n in found}
    rows = draw(st.booleans())
    made = {n: torch.tensor(v, dtype=torch.int64).to(types[n]) for n, v in found.items()}
    return write_tensors({n: v.view(1, -1) if rows and draw(st.booleans()) else v for n, v in made.items()})


@st.composite
def damaged(draw):
    """A good question with some bytes changed, cut or put in."""
    body = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body) - 1))
        body[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
        if not body:
            break
    return bytes(body)


bodies = st.one_of(st.binary(max_size=200), tensors(), damaged())
paths = st.sampled_from(["/states", "/sample", "/read", "/about", "/head", "/", "/%00", "/nothing"])
queries = st.dictionaries(
    st.sampled_from(["wire", "compress", "temperature", "top_k", "top_p", "vocab_size", "session", "past", "rows"]),
    st.sampled_from(["float32", "float8", "1", "0", "-1", "nan", "1e999", "", "é", "257", "0.5", "float64", "a" * 32]),
)

USUAL = {
    "/states": {"wire": "float32"},
    "/sample": {"temperature": "1", "top_k": "0", "top_p": "1", "vocab_size": "257"},
    "/read": {"wire": "float32", "session": "a" * 32, "past": "0", "rows": "1"},
}


def test_no_request_harms_the_server(serve):
    server = serve()
    http = urllib3.PoolManager(retries=False, timeout=20)

    @settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(bodies, paths, queries, st.sampled_from(["POST", "GET", "PUT", "DELETE"]))
    def hold(body, path, query, method):
        query = USUAL.get(path, {}) | query
        url = f"{server.url}{path}?" + "&".join(f"{k}={v}" for k, v in query.items())
        answer = http.request(method, urllib3.util.parse_url(url).url, body=body)
        if path in ("/about", "/head") and method == "GET":
            assert answer.status == 200
        elif answer.status != 200:  # 200: a damaged question that is still one
            assert 400 <= answer.status < 500, (answer.status, answer.data)
            assert json.loads(answer.data)["error"]
        else:
            assert method == "POST" and path in ("/states", "/sample", "/read")

    hold()
    assert http.request("GET", f"{server.url}/health").json()["status"] == "ok"
    assert http.request("POST", f"{server.url}/states?wire=float32", body=GOOD).status == 200


def test_a_body_that_never_ends_is_not_waited_for(serve, monkeypatch):
    from minillm.teacher import server as module

    monkeypatch.setattr(module, "BODY_SECONDS", 0.2)
    with socket.create_connection(serve().socket.getsockname(), 10) as connection:
        connection.sendall(b"POST /states?wire=float32 HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n12345")
        assert b"408" in connection.recv(4096).partition(b"\r\n")[0]


def test_bytes_that_are_no_http_and_bodies_without_end_are_cut_off(serve):
    server = serve(request_tokens=64)
    address = server.socket.getsockname()
    for raw in (
        b"\x16\x03\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /states HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection(address, 10) as connection:
            connection.sendall(raw + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(4096)[9:12] in (b"400", b"404", b"505", b"")
    with socket.create_connection(address, 10) as connection:
        connection.sendall(b"POST /states?wire=float32 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
        for _ in range(3):
            connection.sendall(chunk)
        assert b"413" in connection.recv(4096).partition(b"\r\n")[0]
    assert urllib3.request("GET", f"{server.url}/health").status == 200
