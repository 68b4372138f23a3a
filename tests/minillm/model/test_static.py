"""Decoding at fixed addresses against decoding with the caches of transformers: the same tokens, log-probs and states;
and nothing in it that a CUDA graph could not hold, which is replayed here as a graph would be."""

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from weakref import ref

import pytest
import torch
from every_family import tiny
from recorded import Count, Recorded
from transformers import GPT2Config, GPT2LMHeadModel
from waits import Waits

from minillm.config.schema import ConfigError
from minillm.data.examples import collate
from minillm.model import places, static
from minillm.model.coins import share_coins
from minillm.model.decoder import Decoder, left_pad
from minillm.model.head import CausalLM
from minillm.model.sampling import Decoding, draw_uniforms, greedy, sample
from minillm.model.static import StaticDecoder, takes_graphs

MANY = [[5, 9, 17, 33, 2], [7], [100, 3, 45], [8, 8], [1], [2, 3], [9] * 7, [4], [6, 6], [10], [*range(20, 33)]]
T = 16
ENDING = Decoding(T, range(0, 257, 12))  # responses that end early, late and never


@pytest.fixture
def pair(make_llama, make_gpt2):
    """Of two families, in float64, where no token's uniform lies within the rounding of a boundary."""
    return CausalLM(make_gpt2().double()), CausalLM(make_llama(2, seed=7).double())


@pytest.fixture
def recorded(monkeypatch):
    """Steps are replayed as a graph replays them; here are the recordings."""
    Recorded.made = []
    monkeypatch.setattr(places, "Replayed", Recorded)
    return Recorded.made


def both(pair, decoding=ENDING, groups=0, **settings):
    """The rollouts with the caches of transformers, and at fixed addresses."""
    uniforms = draw_uniforms(0, T, len(MANY) * settings.get("samples_per_prompt", 1))
    if groups:
        uniforms = share_coins(uniforms, groups)
    return [
        sample(*pair, MANY, replace(decoding, graphs=graphs), uniforms=uniforms, **settings)
        for graphs in (False, True)
    ]


def assert_same(expected, found, tolerance=1e-9):
    assert found.prompts == expected.prompts and found.responses() == expected.responses()
    for name, value in expected._asdict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                getattr(found, name), value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(
    ("alpha", "chunk_size", "copies"), [(0.0, 4, 1), (0.2, 0, 1), (0.2, 4, 1), (0.2, 3, 2), (1.0, 4, 1)]
)
def test_replayed_tokens_are_those_of_decoding_step_by_step(pair, recorded, alpha, chunk_size, copies):
    """Dropped rows, places that are taken by others, samples of one prompt, tokens that are forced by the teacher."""
    decoding = replace(ENDING, chunk_size=chunk_size)
    expected, found = both(pair, decoding, alpha=alpha, samples_per_prompt=copies)
    assert_same(expected, found)
    assert len(set(found.lengths.tolist())) > 3
    assert sum(each.replays for each in recorded) > 10


@pytest.mark.parametrize(("alpha", "groups", "chunk_size"), [(0.2, 1, 0), (0.2, 3, 4), (1.0, 1, 4)])
def test_coins_first_replays_the_student_between_the_teachers_turns(pair, recorded, alpha, groups, chunk_size):
    decoding = replace(ENDING, coins_first=True, chunk_size=chunk_size)
    assert_same(*both(pair, decoding, groups=groups, alpha=alpha))
    assert sum(each.replays for each in recorded) > 10


@pytest.mark.parametrize("settings", [{"temperature": 0.7, "top_k": 9}, {"top_p": 0.5}, {"temperature": 0.0}])
def test_filters_and_greedy_decoding_are_replayed(pair, recorded, settings):
    assert_same(*both(pair, replace(ENDING, **settings), alpha=0.3, vocab_size=250))
    assert sum(each.replays for each in recorded) > 10


@pytest.mark.parametrize("settings", [{}, {"chunk_size": 4}, {"chunk_size": 4, "coins_first": True}], ids=str)
@pytest.mark.parametrize(("graphs", "late"), [(False, 3), (True, 3), (True, T)])
def test_what_the_host_learns_late_changes_nothing(pair, monkeypatch, late, settings, graphs):
    """As on a card: rows are decoded beyond their ends until the host knows."""
    uniforms, waits = share_coins(draw_uniforms(0, T, len(MANY)), 1), {}

    def roll(**more):
        decoding = replace(ENDING, **settings, **more)
        with Waits() as found:
            rollout = sample(*pair, MANY, decoding, alpha=0.3, uniforms=uniforms)
        waits[len(waits)] = {where: n for where, n in found.found.items() if "places.py" in where}
        return rollout

    expected = roll()
    monkeypatch.setitem(places.LATE, "cpu", late)
    assert_same(expected, roll(graphs=graphs))
    assert all(len(each) == 1 for each in waits.values())  # where flags are read, and nowhere else


KINDS = {
    "opt": {},
    "cohere": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},  # two types of layers
}


@pytest.mark.parametrize("kind", KINDS)
def test_families_and_windows(kind, recorded):
    """Sequences longer than the window, one of which is read at once."""
    lm = CausalLM(tiny(kind, **KINDS[kind]).double())
    lm.model.config._attn_implementation = "sdpa"
    assert takes_graphs(lm)
    expected, found = both((lm, None), replace(ENDING, chunk_size=3), alpha=0.0)
    assert_same(expected, found, 1e-5)  # norms are float32
    assert sum(each.replays for each in recorded) > 10


def test_eager_attention_that_adds_its_masks(recorded):
    lm = CausalLM(tiny("gemma2", sliding_window=4))  # its scores have a soft-cap, which torch's attention has not
    assert lm.model.config._attn_implementation == "eager" and takes_graphs(lm)
    assert_same(*both((lm, None), replace(ENDING, chunk_size=3), alpha=0.0), 1e-4)


REFUSED = {
    "bloom": {},  # makes its positions of the mask
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},  # a state beside keys and values
    "mamba2": {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "expand": 2},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_decode_as_before_or_are_refused_by_name(kind):
    lm = CausalLM(tiny(kind, **REFUSED[kind]))
    assert not takes_graphs(lm)
    with pytest.raises(ConfigError, match=r"no CUDA graph can hold a step of \w+.*Set it to auto"):
        both((lm, None), alpha=0.0)


def test_a_model_that_chooses_by_values_is_refused(make_llama):
    model = make_llama()
    layer, forward = model.model.layers[0], model.model.layers[0].forward

    def chooses(hidden, *args, **settings):
        return forward(hidden if float(hidden.sum()) == 0 else hidden * 1.0, *args, **settings)

    layer.forward = chooses
    assert not takes_graphs(CausalLM(model))


def test_trying_a_model_leaves_nothing_in_the_casts_of_autocast(make_llama):
    """It is tried inside a rollout, whose autocast remembers what it has cast."""
    lm, tried = CausalLM(make_llama()), CausalLM(make_llama())
    uniforms = draw_uniforms(0, T, len(MANY))
    with torch.autocast("cpu", torch.bfloat16):
        assert takes_graphs(tried)
        expected, found = (
            sample(each, None, MANY, ENDING, alpha=0.0, uniforms=uniforms).student_hidden for each in (lm, tried)
        )
    assert torch.equal(found, expected)


def test_under_autocast_the_caches_of_fp32_weights_are_of_two_types(make_llama, recorded):
    """Keys are rotated in fp32, values come in 16 bits; those of transformers are widened as they join."""
    lm, uniforms = CausalLM(make_llama(2)), draw_uniforms(0, T, len(MANY))
    with torch.autocast("cpu", torch.bfloat16):
        found = sample(lm, None, MANY, replace(ENDING, graphs=True), alpha=0.0, uniforms=uniforms)
    assert any(each.replays for each in recorded) and found.student_logprobs.isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"chunk_size": 4}, {"chunk_size": 4, "coins_first": True}], ids=str)
def test_the_graphs_of_a_rollout_go_with_it(pair, monkeypatch, settings):
    """At once, not when Python collects garbage, perhaps while another graph is captured, which that would break."""
    made = []

    def make(device):
        graph = Recorded(device)
        made.append(ref(graph))
        Recorded.made.clear()
        return graph

    monkeypatch.setattr(places, "Replayed", make)
    gc.disable()
    try:
        both(pair, replace(ENDING, **settings), groups=1, alpha=0.3)
    finally:
        gc.enable()
    assert made and not any(graph() for graph in made)


def test_a_model_that_decodes_otherwise_there_is_refused(make_llama, monkeypatch):
    lm = CausalLM(make_llama())
    monkeypatch.setattr(static, "of_positions", lambda lm, position, room: None)  # rows look at what is not there yet
    assert not takes_graphs(lm)


def test_nothing_moves_between_tokens(pair):
    """The addresses of all that a step reads and writes, but for what it makes itself."""
    padded = left_pad(MANY, T, pair[0].device)
    uniforms, ends = draw_uniforms(0, T, len(MANY)), torch.tensor([3])
    law = places.Law(0.2, 1.0, 0, 1.0, 257, uniforms, ends)
    decoders = [Decoder(lm, padded.exists, padded.any) for lm in pair]
    for decoder in decoders:
        decoder.read(padded.ids)
    known = places.Ends(len(MANY), T, pair[0].device)
    tokens = places.Tokens(len(MANY), T)
    found = places.Places(decoders, law, tokens, known, range(len(MANY)), True)
    with torch.no_grad():
        found.step()
        found.fix(max(map(len, MANY)) + T)

        def addresses():
            kept = [x for each in found.decoders for layer in each.cache.kept.values() for x in layer]
            kept += [x for each in found.decoders for x in (each.state, each.cache.position)]
            kept += [found.rows, found.times, found.token_ids, found.running, *law[5:]]
            return [x.data_ptr() for x in (*kept, *(x for x in tokens.columns if x is not None))]

        before = addresses()
        for _ in range(4):
            found.step()
            assert addresses() == before


def operators(pair, graphs):
    """Operators that the host dispatches for a token of both models."""
    counts = []
    for limit in (6, 12):
        with Count() as count:
            decoding = Decoding(limit, (), graphs=graphs)
            sample(*pair, MANY, decoding, alpha=0.2, uniforms=draw_uniforms(0, limit, len(MANY)))
        counts.append(count.found)
    return (counts[1] - counts[0]) / 6


def test_a_token_is_two_launches_and_a_flag(pair, recorded):
    """Beside them, the flags' copy; without graphs, each operator is a launch."""
    assert all(map(takes_graphs, pair))  # tried here, once
    before, after = operators(pair, False), operators(pair, True)
    assert before > 200 and after <= 3


@pytest.mark.parametrize("graphs", [False, True])
def test_rows_that_have_ended_stay_within_the_positions_of_the_model(graphs):
    """A row that has reached the limit is decoded on beside younger ones, until it is dropped."""
    torch.manual_seed(0)
    settings = {"vocab_size": 264, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    lm = CausalLM(GPT2LMHeadModel(GPT2Config(n_positions=2 + 20, **settings)).eval())
    decoding = Decoding(20, range(0, 264, 30), chunk_size=8, graphs=graphs)
    rollout = sample(lm, None, [[7, 8]] * 40, decoding, alpha=0.0, uniforms=draw_uniforms(1, 20, 40))
    assert rollout.lengths.max() == 20


def test_greedy_answers_are_the_same(pair, monkeypatch):
    expected = greedy(pair[0], MANY, T, 4, [3])
    monkeypatch.setattr("minillm.model.sampling.Decoding", lambda *a, **k: Decoding(*a, **k, graphs=True))
    assert greedy(pair[0], MANY, T, 4, [3]) == expected


def test_a_decoder_of_other_caches_is_not_taken(make_llama, monkeypatch):
    lm, padded = CausalLM(make_llama()), left_pad([[1, 2]], 4, torch.device("cpu"))
    decoder = Decoder(lm, padded.exists, padded.any)
    decoder.read(padded.ids)
    monkeypatch.setattr(static, "LAYERS", ())
    with pytest.raises(ConfigError, match="keeps more of a sequence than keys and values"):
        StaticDecoder(decoder, 6)


# ---- on a card


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"chunk_size": 4}, {"chunk_size": 4, "coins_first": True}], ids=str)
def test_a_card_replays_the_tokens(make_llama, settings, dtype):
    """In 16 bits sums of other shapes round otherwise, and a token that turns over turns over what follows."""
    pair = [CausalLM(model.to("cuda", dtype)) for model in (make_llama(2), make_llama(2, seed=7))]
    assert all(map(takes_graphs, pair))
    expected, found = both(pair, replace(ENDING, **settings), groups=1, alpha=0.3)
    same = [a == b for a, b in zip(expected.responses(), found.responses(), strict=True)]
    assert sum(same) >= (len(MANY) if dtype == torch.float32 else 0.5 * len(MANY))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_replays_what_autocast_casts_and_beside_a_thread_that_trains(make_llama):
    """As rollouts are sampled under rollout.overlap: by a thread and a stream of its own, in 16 bits."""
    lm, other = CausalLM(make_llama(2).cuda()), CausalLM(make_llama(2, seed=3).cuda())
    stream = torch.cuda.Stream()

    def roll():
        with torch.cuda.stream(stream), torch.autocast("cuda", torch.bfloat16):
            uniforms = draw_uniforms(0, T, len(MANY))
            return sample(lm, None, MANY, replace(ENDING, graphs=True), alpha=0.0, uniforms=uniforms)

    alone = roll()
    with ThreadPoolExecutor(1) as thread:
        sampling = thread.submit(roll)
        for _ in range(20):
            batch = collate([[5, 6]] * 4, [[7, 8, 9]] * 4).to(other.device)
            other.output(batch).states.float().square().sum().backward()
        beside = sampling.result()
    assert beside.responses() == alone.responses()
