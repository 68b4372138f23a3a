"""Where a response ends: at what ends a turn of the chat template, whatever the tokenizer calls end-of-sequence."""

import json

import pytest
import torch
from tokenizers import AddedToken

from minillm.config.recipe import load_recipe
from minillm.config.schema import DataConfig, EvalDataConfig
from minillm.data.examples import encode, to_record
from minillm.data.prompts import answer_end
from minillm.distillation import load_pair, run_recipe
from minillm.model.check import check_same_tokenizer
from minillm.model.head import CausalLM
from minillm.model.load import end_tokens
from minillm.model.sampling import Decoding, draw_uniforms, sample
from minillm.train.preflight import prepare

TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT, PLAIN = EvalDataConfig(), EvalDataConfig(prompt_template="Q: {prompt} A:")


@pytest.fixture
def turns(make_tokenizer):
    """End-of-sequence is <eos>; the template ends a turn with <end> and a line break."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<end>", special=True)]})
    tokenizer.chat_template = TURNS
    return tokenizer


def test_an_answer_ends_as_the_template_ends_it(turns, tokenizer):
    end = turns.convert_tokens_to_ids("<end>")
    assert answer_end(turns, CHAT) == [end]
    assert answer_end(turns, PLAIN) == [turns.eos_token_id]
    assert answer_end(tokenizer, CHAT) == [tokenizer.eos_token_id]  # its template ends no turn
    (example,) = encode(
        [to_record({"prompt": "Hi", "completion": "Ho"}, "x")], turns, CHAT, DataConfig(), "x"
    ).examples
    assert turns.decode(example.response) == "Ho<end>"


def test_every_end_of_both_models_ends_a_response(turns, make_llama):
    student, teacher = make_llama(1), make_llama(1)
    student.generation_config.eos_token_id, teacher.generation_config.eos_token_id = [7, 9], 8
    assert end_tokens(turns, CHAT, [student, teacher]) == (turns.convert_tokens_to_ids("<end>"), 0, 7, 9, 8)
    assert end_tokens(turns, PLAIN, []) == (0,)


def test_a_response_stops_at_the_first_end_of_any_kind(make_llama):
    student, uniforms = CausalLM(make_llama(2)), draw_uniforms(0, 12, 1)
    prompt = [[5, 6, 7]]
    free = sample(student, None, prompt, Decoding(12, []), alpha=0.0, uniforms=uniforms).responses()[0]
    assert len(free) == 12
    found = sample(student, None, prompt, Decoding(12, [free[9], free[4]]), alpha=0.0, uniforms=uniforms).responses()[
        0
    ]
    assert found == free[: min(free.index(free[9]), free.index(free[4])) + 1]


def test_models_of_one_vocabulary_may_name_different_ends(make_tokenizer):
    """An instruct teacher and a base student."""
    student, teacher = make_tokenizer(extra="<turn>"), make_tokenizer(extra="<turn>")
    teacher.eos_token = "<turn>"
    check_same_tokenizer(student, teacher)


def test_rollouts_and_evaluation_stop_where_the_teacher_s_template_does(files, turns, capsys):
    """A model that says <end> at once: transformers stops there, and so do we."""
    from transformers import LlamaForCausalLM

    end = turns.convert_tokens_to_ids("<end>")
    for name in ("teacher", "student"):
        model = LlamaForCausalLM.from_pretrained(files / name)
        model.resize_token_embeddings(end + 1)
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.weight[end] = 0.0
            model.model.norm.weight.zero_()
        model.save_pretrained(files / name)
        turns.save_pretrained(files / name)
    recipe = load_recipe(files / "recipe.yaml", ["--rollout.max_new_tokens=60", "--objective.pt_weight=0"])
    student, teacher, tokenizer = load_pair(recipe.run)
    context = prepare(recipe.run, recipe.stages["minillm"], student, teacher, tokenizer)
    assert context.ends == (end, 0)
    assert "a response ends at '<end>' or '<eos>'" in context.about
    rollout = context.roll_out(1, context.examples[:8], teacher, 0.2)  # all tokens are equally likely
    for response in rollout.responses():
        assert not {end, 0} & set(response[:-1])
    lengths = rollout.lengths.float()
    assert lengths.max() > lengths.min()


def test_a_run_says_where_responses_end(files, capsys):
    run_recipe(load_recipe(files / "recipe.yaml", ["--optim.steps=1"]), "", with_evaluation=False)
    assert "a response ends at '<eos>'" in capsys.readouterr().out
    assert json.loads((files / "run" / "summary.json").read_text())["stages"]["minillm"]["steps"] == 1
