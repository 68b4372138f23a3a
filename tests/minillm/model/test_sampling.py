"""The sampler against full forward passes, unpadded decoding and transformers' own greedy search."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from every_family import tiny
from transformers import GenerationConfig

from minillm.model.coins import share_coins
from minillm.model.decoder import Decoder, takes_rows
from minillm.model.head import CausalLM
from minillm.model.masks import takes_masks
from minillm.model.sampling import Decoding, decode, draw_uniforms, greedy, greedy_responses, sample

PROMPTS = [[5, 9, 17, 33, 2], [7], [100, 3, 45]]
NO_EOS = -1
SIX = Decoding(6, [NO_EOS])


@pytest.fixture(params=["make_llama", "make_gpt2"])
def student(request):
    return CausalLM(request.getfixturevalue(request.param)())


@pytest.fixture
def pair(student, make_llama):
    return student, CausalLM(make_llama(2, seed=7))


def roll(student, teacher, prompts=PROMPTS, decoding=SIX, seed=0, **settings):
    copies = settings.get("samples_per_prompt", 1)
    uniforms = draw_uniforms(seed, decoding.max_new_tokens, len(prompts) * copies)
    return sample(student, teacher, prompts, decoding, uniforms=uniforms, **settings)


def full_logprobs(model, prompt, response):
    ids = torch.tensor([prompt + response])
    logprobs = model.model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0]


@torch.no_grad()
def test_logprobs_are_those_of_a_full_forward(pair):
    student, teacher = pair
    rollout = roll(student, teacher)
    for i, (prompt, response) in enumerate(zip(PROMPTS, rollout.responses(), strict=True)):
        q, p = full_logprobs(student, prompt, response), full_logprobs(teacher, prompt, response)
        torch.testing.assert_close(rollout.student_logprobs[i], q, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rollout.teacher_logprobs[i], p, rtol=1e-4, atol=1e-4)
        mixture = torch.log(0.2 * p.exp() + 0.8 * q.exp())
        torch.testing.assert_close(rollout.mixture_logprobs[i], mixture, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hidden_states_kept_give_the_distributions_again(pair):
    rollout = roll(*pair)
    for model, hidden, logprobs in (
        (pair[0], rollout.student_hidden, rollout.student_logprobs),
        (pair[1], rollout.teacher_hidden, rollout.teacher_logprobs),
    ):
        again = model.logits(hidden).log_softmax(-1).gather(-1, rollout.token_ids[..., None])[..., 0]
        torch.testing.assert_close(again, logprobs, rtol=1e-4, atol=1e-4)


def test_left_padding_changes_nothing(pair):
    student, teacher = pair
    together = roll(student, teacher)
    uniforms = draw_uniforms(0, 6, len(PROMPTS))
    for i, prompt in enumerate(PROMPTS):
        alone = sample(student, teacher, [prompt], SIX, uniforms=uniforms[:, i : i + 1])
        assert alone.responses() == [together.responses()[i]]
        torch.testing.assert_close(alone.mixture_logprobs[0], together.mixture_logprobs[i], rtol=1e-4, atol=1e-4)


def test_each_sequence_stops_at_its_own_end(pair):
    student, teacher = pair
    free = roll(student, teacher, decoding=Decoding(8, [NO_EOS]))
    eos = free.responses()[0][2]
    stopped = roll(student, teacher, decoding=Decoding(8, [eos]))
    for long, short in zip(free.responses(), stopped.responses(), strict=True):
        expected = long[: long.index(eos) + 1] if eos in long else long
        assert short == expected
    beyond = ~stopped.mask
    assert beyond.any()
    for values in (stopped.token_ids, stopped.student_logprobs, stopped.teacher_logprobs, stopped.mixture_logprobs):
        assert (values[beyond] == 0).all()
    assert not stopped.from_teacher[beyond].any()


def test_decoding_ends_when_every_sequence_has(pair):
    student, teacher = pair
    eos = roll(student, teacher, prompts=PROMPTS[:1]).responses()[0][0]
    rollout = roll(student, teacher, prompts=PROMPTS[:1], decoding=Decoding(6, [eos]))
    assert rollout.token_ids.tolist() == [[eos]]
    assert rollout.lengths.tolist() == [1]


def test_greedy_is_that_of_transformers(student):
    ours = greedy(student, PROMPTS, 8, batch_size=2, ends=[0])
    for prompt, response in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = student.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=0, pad_token_id=0
        )
        assert response == theirs[0, len(prompt) :].tolist()


@torch.no_grad()
def test_greedy_is_the_argmax_whatever_the_generation_config(make_llama):
    model = make_llama(2)
    model.generation_config = GenerationConfig(no_repeat_ngram_size=1, repetition_penalty=5.0, do_sample=True)
    prompts = [[5, 6, 7], [9]]
    responses = greedy(CausalLM(model), prompts, 60, batch_size=2, ends=[256])
    for prompt, response in zip(prompts, responses, strict=True):
        assert len(set(response)) < len(response)  # a penalty on repetition would show
        ids = list(prompt)
        for token in response:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_greedy_responses_are_text_without_special_tokens(student, tokenizer):
    found = greedy_responses(student, tokenizer, PROMPTS, 8, 2, [0])
    assert found == decode(tokenizer, greedy(student, PROMPTS, 8, 2, [0]))
    assert decode(tokenizer, [[*tokenizer.encode(" a b "), tokenizer.eos_token_id]]) == ["a b"]


def test_samples_of_one_prompt_are_those_of_the_prompt_repeated(pair):
    student, teacher = pair
    shared = roll(student, teacher, samples_per_prompt=2)
    repeated = roll(student, teacher, prompts=[p for p in PROMPTS for _ in range(2)])
    assert shared.prompts == repeated.prompts
    assert shared.responses() == repeated.responses()


def test_without_mixing_the_mixture_is_the_student(pair):
    student, teacher = pair
    alone, beside = roll(student, None, alpha=0.0), roll(student, teacher, alpha=0.0)
    assert alone.teacher_logprobs is None and alone.teacher_hidden is None
    assert alone.responses() == beside.responses()
    torch.testing.assert_close(beside.mixture_logprobs, beside.student_logprobs)
    assert not beside.from_teacher.any()


@pytest.mark.parametrize("row_length", [0, 20])
def test_a_teacher_without_part_in_the_draw_is_scored_as_if_it_had_decoded(pair, row_length):
    """top_k as large as the vocabulary filters nothing, but makes the teacher decode. Ragged responses, unequal heads,
    another temperature; more sequences than a forward pass takes."""
    student, teacher = pair
    prompts, settings = PROMPTS * 7, {"alpha": 0.0, "vocab_size": 250}
    free = Decoding(8, [NO_EOS], temperature=0.7)
    decoding = replace(free, ends=[roll(student, None, prompts, free, **settings).responses()[4][3]])
    read = roll(student, teacher, prompts, decoding, row_length=row_length, **settings)
    decoded = roll(student, teacher, prompts, replace(decoding, top_k=250), **settings)
    assert len(set(read.lengths.tolist())) > 1 and read.responses() == decoded.responses()
    for name in ("student_logprobs", "teacher_logprobs", "mixture_logprobs"):
        torch.testing.assert_close(getattr(read, name), getattr(decoded, name), rtol=1e-4, atol=1e-4)
    mask = read.mask
    torch.testing.assert_close(read.teacher_hidden[mask], decoded.teacher_hidden[mask], rtol=1e-4, atol=1e-4)
    assert (read.teacher_hidden[~mask] == 0).all() and (read.teacher_logprobs[~mask] == 0).all()


def test_unequal_heads_are_sampled_from_the_common_vocabulary(make_llama):
    student, teacher = CausalLM(make_llama(vocab_size=257)), CausalLM(make_llama(2, vocab_size=300, seed=3))
    rollout = roll(student, teacher, decoding=Decoding(12, [NO_EOS]), alpha=1.0, vocab_size=257)
    assert rollout.token_ids.max() < 257
    assert torch.isfinite(rollout.student_logprobs).all()


def test_the_same_seed_gives_the_same_rollout(pair):
    assert roll(*pair, seed=3).responses() == roll(*pair, seed=3).responses()
    assert roll(*pair, seed=3).responses() != roll(*pair, seed=4).responses()


def test_logits_that_are_not_finite_are_not_sampled(make_llama):
    model = make_llama(1)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(FloatingPointError, match=r"logits of LlamaForCausalLM are not finite .*token ids \[7\]"):
        sample(CausalLM(model, "logits"), None, PROMPTS, SIX, alpha=0.0)


# ---- rows that have ended are dropped, and chunks

MANY = [*PROMPTS, [8, 8], [1], [2, 3], [9, 9, 9, 9, 9, 9, 9], [4], [6, 6], [10]]  # lengths 1 to 7


def frequent_ends(first):
    """A twelfth of the vocabulary: responses of 24 tokens end early, late and never."""
    return Decoding(24, range(first, 257, 12))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("chunk_size", "copies"), [(0, 1), (4, 1), (3, 2)])
def test_tokens_do_not_depend_on_what_is_decoded_together(pair, chunk_size, copies, alpha):
    """Each prompt alone, where nothing is dropped before all is over, against all of them, and against few places that
    are refilled. In float64, where no token's uniform lies within the rounding of a boundary."""
    for model in pair:
        model.double()
    settings = {"samples_per_prompt": copies, "alpha": alpha}
    together = roll(*pair, MANY, replace(frequent_ends(0), chunk_size=chunk_size), **settings)
    uniforms = draw_uniforms(0, 24, len(MANY) * copies)
    assert len(set(together.lengths.tolist())) > 3
    for row, (prompt, response) in enumerate(zip(together.prompts, together.responses(), strict=True)):
        assert prompt == MANY[row // copies]
        alone = sample(*pair, [prompt], frequent_ends(0), uniforms=uniforms[:, row : row + 1], alpha=alpha)
        assert alone.responses() == [response]
        for name in ("student_logprobs", "mixture_logprobs", "student_hidden", "teacher_hidden"):
            found = getattr(together, name)[row, : len(response)]
            torch.testing.assert_close(found, getattr(alone, name)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_chunks_of_coins_first_are_refilled_places_side_by_side(pair, groups, alpha):
    for model in pair:
        model.double()
    uniforms = share_coins(draw_uniforms(0, 24, len(MANY)), groups)
    found, expected = (
        sample(*pair, MANY, replace(frequent_ends(0), **settings), alpha=alpha, uniforms=uniforms)
        for settings in ({"chunk_size": 4, "coins_first": True}, {"chunk_size": 4})
    )
    assert found.prompts == expected.prompts and found.responses() == expected.responses()
    torch.testing.assert_close(found.mixture_logprobs, expected.mixture_logprobs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.teacher_hidden, expected.teacher_hidden, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", [{"coins_first": True}, {}])
def test_no_chunk_is_lost_where_the_prompts_are_in_order(pair, settings):
    prompts = sorted(MANY, key=len, reverse=True)
    pair[0].takes_rows = False
    found = roll(*pair, prompts, replace(SIX, chunk_size=4, **settings))
    assert found.prompts == prompts and len(found.responses()) == len(found.token_ids) == len(prompts)


def reads(lm):
    """How many rows each forward pass of the model has, from now on, and how many columns it reads."""
    assert takes_masks(lm) and takes_rows(lm)  # tried once, which is not counted
    rows = []
    lm.model.base_model.register_forward_hook(lambda _, __, output: rows.append(output.last_hidden_state.shape[:2]))
    return rows


def test_rows_that_have_ended_are_dropped(pair):
    """Rows that went through the student, against the tokens that exist: without dropping, all rows go to the end."""
    passes = reads(pair[0])
    rollout = roll(*pair, MANY * 4, frequent_ends(0))
    rows, steps = [row for row, _ in passes], rollout.token_ids.shape[1]
    wasted = sum(rows) - int(rollout.lengths.sum())
    assert len(rows) == steps and rows[0] == 40
    assert wasted < 0.25 * 40 * steps < 40 * steps - int(rollout.lengths.sum())
    assert all(after <= 0.75 * before for before, after in pairwise(rows) if after != before)


def test_a_row_that_has_ended_makes_place_for_the_next_prompt(pair):
    """The places are nearly always in use: few forward passes, against those of as many places in one turn after the
    other, where a turn lasts as long as its longest response."""
    places, decoding = 8, replace(frequent_ends(0), chunk_size=8)
    prompts = [[*prompt, 3] for prompt in MANY] * 8  # none of one token, so that passes over prompts are told apart
    passes = reads(pair[0])
    together = roll(*pair, prompts, decoding)
    tokens = [row for row, columns in passes if columns == 1]
    assert max(row for row, _ in passes) == places and sum(row for row, columns in passes if columns > 1) == 80
    assert len(tokens) < 1.4 * int(together.lengths.sum()) / places
    passes.clear()
    pair[0].takes_rows = False  # as of a model whose rows cannot join: in turns, with the same tokens
    in_turns = roll(*pair, prompts, decoding)
    assert in_turns.responses() == together.responses()
    assert max(row for row, _ in passes) == places
    assert len(tokens) < 0.7 * len([row for row, columns in passes if columns == 1])


def test_columns_in_front_of_the_longest_row_are_dropped(make_llama, monkeypatch):
    """A long prompt that has ended leaves nothing behind."""
    lm, longest = CausalLM(make_llama()), []
    keep = Decoder.keep

    def kept(self, rows, length=None):
        keep(self, rows, length)
        longest.append((self.length, self.cache.layers[0].keys.shape[-2], self.exists[:, : self.length]))

    assert takes_rows(lm)
    monkeypatch.setattr(Decoder, "keep", kept)
    prompts = [[*range(2, 90)], [5], [6], [7], [8], [9]]
    roll(lm, None, prompts, replace(frequent_ends(0), chunk_size=2), alpha=0.0)
    length, columns, exists = longest[-1]
    assert length == columns < 30 and exists[:, 0].any()


@pytest.mark.parametrize("moves", ["a cache of its own", "an error", "another law"])
def test_a_model_whose_rows_cannot_join_decodes_in_turns(make_llama, moves, monkeypatch):
    lm = CausalLM(make_llama())
    if moves == "a cache of its own":
        monkeypatch.setattr("minillm.model.decoder.LAYERS", ())
    elif moves == "an error":
        monkeypatch.setattr("minillm.model.decoder.STATES", ("keys",))  # values of another number of rows
    else:
        monkeypatch.setattr(Decoder, "_end_at", lambda self, length: setattr(self, "length", length))
    assert not takes_rows(lm)


KINDS = {
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},  # two types of layers
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "expand": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_recurrent_states_are_refilled(kind):
    """Sequences longer than the window join and are joined; a recurrent state moves with its row."""
    lm = CausalLM(tiny(kind, **KINDS[kind]).double())
    lm.model.config._attn_implementation = "sdpa"
    decoding = Decoding(12, range(0, 264, 9), chunk_size=3)
    assert takes_rows(lm)
    prompts = [*MANY, [*range(20, 33)], [*range(5, 16)]]
    uniforms = draw_uniforms(0, 12, len(prompts))
    found = sample(lm, None, prompts, decoding, alpha=0.0, uniforms=uniforms)
    for row, (prompt, response) in enumerate(zip(prompts, found.responses(), strict=True)):
        alone = sample(lm, None, [prompt], decoding, alpha=0.0, uniforms=uniforms[:, row : row + 1])
        assert alone.responses() == [response]
        states = found.student_hidden[row, : len(response)]
        torch.testing.assert_close(states, alone.student_hidden[0], rtol=1e-5, atol=1e-5)  # norms are float32


def test_a_chunk_bounds_the_rows_decoded_at_once(pair):
    passes = reads(pair[0])
    roll(*pair, MANY, replace(SIX, chunk_size=4))
    assert max(rows for rows, _ in passes) == 4
