import pytest

from minillm.config import Data
from minillm.data import DataError, Record, Shuffled, chunk_text, collate, encode, read_records, read_text

USER = {"role": "user", "content": "Hi"}


def write(tmp_path, text, name="data.jsonl"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("line", "prompt", "answer"),
    [
        ('{"prompt": "Hi", "completion": "Ho"}', "Hi", "Ho"),
        ('{"prompt": "Hi"}', "Hi", None),
        ('{"instruction": "Add", "input": "1 2", "output": "3"}', "Add\n\n1 2", "3"),
        ('{"instruction": "Add", "input": "", "output": "3"}', "Add", "3"),
        ('{"instruction": "Add"}', "Add", None),
        ('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}', "Hi", "Ho"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "Hi", None),
    ],
)
def test_forms_that_are_recognised(tmp_path, line, prompt, answer):
    (record,) = read_records(write(tmp_path, line + "\n\n"))
    assert (record.prompt, record.answer) == (prompt, answer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "?", "answer": "!"}', r"record 1: found the columns \['answer', 'question'\]; expected"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        ("[1]", "line 1 holds a list"),
        ("", "is empty: expected records of the form"),
        ('{"messages": []}', "must be a list of objects"),
        ('{"prompt": [{"role": "user", "content": "Hi"}]}', "must be text; conversations go into `messages`"),
        ('{"prompt": "a", "completion": 3}', "must be text"),
        ('{"messages": [{"role": "user"}]}', "must be a list of objects"),
    ],
)
def test_anything_else_is_an_error_that_says_what_was_found(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path, text))


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no data at 'none.jsonl'.*package:NAME"):
        read_records("none.jsonl")


def test_text_files(tmp_path):
    assert read_text(write(tmp_path, "one\ntwo", "a.txt")) == ["one\ntwo"]
    assert read_text(write(tmp_path, '{"text": "one"}\n{"text": "two"}')) == ["one", "two"]
    with pytest.raises(DataError, match=r"found the columns \['prompt'\]; plain text needs `text`"):
        read_text(write(tmp_path, '{"prompt": "one"}'))
    with pytest.raises(DataError, match="holds no text"):
        read_text(write(tmp_path, " \n", "b.txt"))


def test_prompts_follow_the_template_and_answers_end(tokenizer):
    records = [Record([USER], "Ho")]
    (chat,) = encode(records, tokenizer, Data(), "x").examples
    assert tokenizer.decode(chat.prompt) == "[user]Hi>"
    assert tokenizer.decode(chat.response) == "Ho<eos>"
    (plain,) = encode(records, tokenizer, Data(prompt_template="Q: {prompt} A:"), "x").examples
    assert tokenizer.decode(plain.prompt) == "Q: Hi A:"


def test_a_cut_answer_does_not_teach_to_stop(tokenizer):
    (example,) = encode([Record([USER], "Hello")], tokenizer, Data(max_response_length=3), "x").examples
    assert tokenizer.decode(example.response) == "Hel"


def test_overlong_prompts(tokenizer):
    records = [Record([USER], "a"), Record([{"role": "user", "content": "long " * 20}], "b", "x, record 2")]
    with pytest.raises(DataError, match=r"x: 1 of 2 prompts.*= 20 tokens; the first is x, record 2 with 107"):
        encode(records, tokenizer, Data(max_prompt_length=20), "x")
    kept = encode(records, tokenizer, Data(max_prompt_length=20, overlong_prompts="drop"), "x")
    assert [example.record.answer for example in kept.examples] == ["a"]
    assert str(kept) == "1 of 2 records (1 overlong prompts left out)"
    with pytest.raises(DataError, match="every prompt is longer"):
        encode(records[1:], tokenizer, Data(max_prompt_length=20, overlong_prompts="drop"), "x")


def test_a_tokenizer_without_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"has no chat template: set data.prompt_template"):
        encode([Record([USER], "a")], tokenizer, Data(), "x")


def test_every_response_token_counts_once_and_nothing_else():
    eos = 0  # also the pad token, and the id that fills padding
    prompts, responses = [[1, 2, 3], [4], [5, 6]], [[7, eos], [8, 9, 8, eos], []]
    batch = collate(prompts, responses)
    assert batch.targets.tolist() == [7, eos, 8, 9, 8, eos]
    assert batch.attention_mask.sum(1).tolist() == [5, 5, 2]
    assert batch.predict.sum(1).tolist() == [2, 4, 0]
    following = batch.input_ids.roll(-1, dims=1)[batch.predict]
    assert following.tolist() == batch.targets.tolist()
    assert not (batch.predict & (batch.attention_mask == 0)).any()


def test_text_is_chunked_with_document_ends(tokenizer):
    chunks = chunk_text(["abc", "de"], tokenizer, 3)
    assert tokenizer.batch_decode(chunks) == ["abc", "<eos>de"]
    with pytest.raises(DataError, match="fewer than one chunk"):
        chunk_text(["abc"], tokenizer, 50)


def test_each_epoch_is_a_new_permutation():
    stream = Shuffled(5, seed=0)
    epochs = [stream.take(5 * epoch, 5) for epoch in range(4)]
    flat = [i for epoch in epochs for i in epoch]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert Shuffled(5, seed=0).take(3, 9) == flat[3:12]  # a function of the position
    assert stream.take(2, 6) == flat[2:8]  # backwards too
