"""A teacher on a server is the teacher: in its own type to the bit, in others to their rounding; and what happens when
it is busy, slow, another one or gone."""

import threading
from dataclasses import replace

import pytest
import torch

from minillm.config.schema import ConfigError, TeacherConfig
from minillm.data.examples import collate
from minillm.lost import ServerLost
from minillm.model.head import CausalLM
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.teacher.wire import Question, pack_states, write_tensors

urllib3 = pytest.importorskip("urllib3", reason="the extra `teach`")
QUICK = TeacherConfig(timeout=20.0, patience=1.0)
PROMPTS = [[5, 9, 33, 7], [8, 2], [100, 4, 4, 4, 4, 17, 250]]
RESPONSES = [[6, 7, 8], [3], [12, 13, 14, 15, 16]]


def batch(row_length=0, turns=None):
    return collate(PROMPTS, RESPONSES, row_length, turns)


@pytest.fixture
def local(make_llama):
    lm = CausalLM(make_llama(4).requires_grad_(False))
    return lambda asked: torch.no_grad()(lm.output)(asked)


@pytest.mark.parametrize("turns", [None, [[(1, 2)], [], [(2, 4)]]])
def test_states_and_head_are_those_of_the_teacher_to_the_bit(serve, ask, local, turns):
    found, expected = ask(serve()).output(batch(turns=turns)), local(batch(turns=turns))
    assert torch.equal(found.states, expected.states)
    assert torch.equal(found.head.weight, expected.head.weight) and found.head.bias is None


def test_sequences_that_share_a_row_travel_one_by_one(serve, ask, local):
    found, expected = ask(serve()).output(batch(row_length=30)), local(batch())
    torch.testing.assert_close(found.states, expected.states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float8"])
def test_compressed_states_are_the_same(serve, ask, wire):
    server = serve()
    plain, compressed = (ask(server, settings=replace(QUICK, wire=wire, compress=on)) for on in (False, True))
    assert torch.equal(plain.output(batch()).states, compressed.output(batch()).states)


def test_compression_saves_a_quarter_of_16_bits():
    states = torch.randn(64, 256)
    plain, compressed = (len(pack_states(states, torch.bfloat16, on)) for on in (False, True))
    assert plain < 2 * states.numel() + 200 and compressed < 0.76 * plain


@pytest.mark.parametrize(("wire", "share"), [("bfloat16", 2**-8), ("float8", 2**-4)])
def test_a_narrower_wire_rounds_and_does_no_more(serve, ask, local, wire, share):
    expected = local(batch()).states
    found = ask(serve(), settings=replace(QUICK, wire=wire)).output(batch()).states
    bound = share * expected.abs() + (expected.abs().amax(1, keepdim=True) * 2**-16 if wire == "float8" else 0)
    assert found.dtype == expected.dtype and not torch.equal(found, expected)
    assert bool(((found - expected).abs() <= bound).all())


def test_a_teacher_in_16_bits_travels_as_it_is(serve, ask, make_llama):
    model = make_llama(4).bfloat16().requires_grad_(False)
    expected = torch.no_grad()(CausalLM(model).output)(batch())
    found = ask(serve(model), settings=replace(QUICK, compress=True)).output(batch())
    assert found.states.dtype == torch.bfloat16 and torch.equal(found.states, expected.states)


def test_its_answers_are_those_of_the_teacher_here(serve, ask, make_llama):
    uniforms, decoding = draw_uniforms(3, 6, len(PROMPTS)), Decoding(6, ends=(0, 9), temperature=0.8, top_p=0.9)
    expected = sample(CausalLM(make_llama(4)), None, PROMPTS, decoding, alpha=0.0, uniforms=uniforms).responses()
    assert ask(serve()).sample(PROMPTS, decoding, uniforms, 257) == expected


def test_questions_of_several_clients_share_a_forward_pass(serve, ask, local):
    server = serve()
    clients, lm, passes = [ask(server) for _ in range(3)], server.teacher.lm, []
    output, busy, go_on = lm.output, threading.Event(), threading.Event()
    lm.output = lambda asked: (busy.set(), go_on.wait(10), passes.append(len(asked.input_ids)), output(asked))[-1]
    asked = [clients[0].ask(batch())]
    busy.wait(10)
    asked += [client.ask(batch()) for client in clients]
    while server.teacher.worker.jobs.qsize() < 3:
        assert not asked[0].done()
    go_on.set()
    for each in asked:
        torch.testing.assert_close(each.result(10), local(batch()).states, rtol=1e-5, atol=1e-5)
    assert passes == [3, 9]


def test_long_questions_take_several_forward_passes(serve, ask, local):
    found = ask(serve(max_tokens=9)).output(batch()).states
    torch.testing.assert_close(found, local(batch()).states, rtol=1e-5, atol=1e-5)


def test_a_busy_server_says_so_and_is_asked_again(serve, ask, local):
    server = serve(waiting=1)
    teacher, lm = ask(server, settings=replace(QUICK, prefetch=8, patience=20)), server.teacher.lm
    output, busy, first = lm.output, threading.Event(), threading.Event()
    lm.output = lambda asked: (busy.set(), first.wait(10), output(asked))[-1]
    asked = [teacher.ask(batch()) for _ in range(6)]
    busy.wait(10)
    while not server.teacher.worker.jobs.full():
        assert not asked[0].done()
    body = write_tensors(Question.of(batch())._asdict())
    answer = urllib3.request("POST", f"{server.url}/states?wire=float32", body=body, retries=False)
    assert answer.status == 503
    assert answer.headers["retry-after"] == "1" and "1 questions wait already" in answer.json()["error"]
    first.set()
    for each in asked:
        torch.testing.assert_close(each.result(20), local(batch()).states, rtol=1e-5, atol=1e-5)


def test_the_head_is_fetched_once(serve, ask):
    server = serve()
    ask(server)
    server.teacher.folder.cleanup()  # from here on, the head cannot be sent
    assert ask(server).head.weight.shape == (257, 32)


def test_a_token_is_wanted_where_one_is_set(serve, ask, monkeypatch):
    server = serve(token="secret")
    with pytest.raises(ConfigError, match=r"401.*MINILLM_TEACHER_TOKEN"):
        ask(server)
    monkeypatch.setenv("MINILLM_TEACHER_TOKEN", "secret")
    ask(server).output(batch())


def test_what_is_too_large_for_one_question_travels_in_several(serve, ask, local, make_llama):
    server = serve(request_tokens=13)  # of the longest prompt and its answer, by one
    teacher, uniforms, decoding = ask(server), draw_uniforms(3, 6, len(PROMPTS)), Decoding(6, ends=(0, 9))
    torch.testing.assert_close(teacher.output(batch()).states, local(batch()).states, rtol=1e-5, atol=1e-5)
    expected = sample(CausalLM(make_llama(4)), None, PROMPTS, decoding, alpha=0.0, uniforms=uniforms).responses()
    assert teacher.sample(PROMPTS, decoding, uniforms, 257) == expected


def test_what_is_too_large_is_refused_with_the_limit(serve, ask):
    server = serve(request_tokens=15)
    body = write_tensors(Question.of(batch())._asdict())
    answer = urllib3.request("POST", f"{server.url}/states?wire=float32", body=body, retries=False)
    assert answer.status == 413 and "22 tokens at once, of at most 15" in answer.json()["error"]
    with pytest.raises(ConfigError, match="reads at most 10"):
        ask(serve(request_tokens=10)).output(batch())


def test_another_server_takes_over(serve, ask, local):
    one, other = serve(), serve()
    teacher = ask(one, other)
    one.kill()
    for _ in range(4):
        assert torch.equal(teacher.output(batch()).states, local(batch()).states)


def test_a_teacher_that_is_gone_is_lost_after_the_patience(serve, ask):
    server = serve()
    teacher = ask(server)
    server.kill()
    with pytest.raises(ServerLost, match=r"has not answered for 1 s \(teacher.patience\): http://127.0.0.1"):
        teacher.output(batch())


def test_a_server_that_comes_back_is_asked_again(serve, ask, local):
    server = serve()
    teacher = ask(server, settings=replace(QUICK, patience=20.0))
    server.kill()
    asked = teacher.ask(batch())
    serve(port=int(server.url.rpartition(":")[2]))
    assert torch.equal(asked.result(20), local(batch()).states)


def test_another_model_at_the_same_address_is_not_listened_to(serve, ask, make_llama):
    server = serve()
    teacher = ask(server)
    server.kill()
    serve(make_llama(4, seed=7), port=int(server.url.rpartition(":")[2]))
    with pytest.raises(ServerLost, match="serves another model"):
        teacher.output(batch())
    with pytest.raises(ConfigError, match="serve different models"):
        ask(serve(), serve(make_llama(3)))


def test_a_model_that_fails_fails_this_answer_alone(serve, ask, local):
    server = serve()
    teacher, lm = ask(server), server.teacher.lm
    output = lm.output
    lm.output = lambda asked: 1 / 0
    with pytest.raises(ServerLost, match="500: the model failed: division by zero"):
        teacher.output(batch())
    lm.output = output
    assert torch.equal(teacher.output(batch()).states, local(batch()).states)


def test_a_server_that_stops_answers_what_it_was_asked(serve, ask, local):
    server = serve()
    teacher, lm = ask(server), server.teacher.lm
    output, busy, go_on = lm.output, threading.Event(), threading.Event()
    lm.output = lambda asked: (busy.set(), go_on.wait(10), output(asked))[-1]
    asked = teacher.ask(batch())
    busy.wait(10)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    go_on.set()
    assert torch.equal(asked.result(10).view(-1), local(batch()).states.view(-1))
    stopping.join()
    assert not server.teacher.worker.thread.is_alive()


def test_closing_waits_for_nobody(serve, ask):
    server = serve()
    teacher = ask(server, settings=replace(QUICK, patience=1000.0))
    server.kill()
    asked = teacher.ask(batch())
    teacher.close()
    with pytest.raises(ServerLost):
        asked.result(10)
