import json
import sys

import pytest

from minillm.config.schema import DataConfig, EvalDataConfig
from minillm.data.examples import (
    DataError,
    Record,
    Shuffled,
    chunk_text,
    collate,
    encode,
    read_records,
    read_text,
    show,
)

CHAT, ALPACA = EvalDataConfig(), EvalDataConfig(prompt_template="alpaca")
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


def test_several_right_answers_and_options(tmp_path):
    line = '{"instruction": "Yes?", "output": ["yes", "yeah"], "options": ["no", "yes"]}'
    (record,) = read_records(write(tmp_path, line))
    assert record.answer == "yes" and record.references == ["yes", "yeah"] and record.options == ("no", "yes")
    assert Record([], None).references == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "?", "answer": "!"}', r"record 1: found the columns \['answer', 'question'\]; expected"),
        ('{"prompt": "a"}\n{"prompt": ', r"line 2 is not JSON.*To see it: sed -n 2p \S+data.jsonl$"),
        ("[1]", "record 1 of the list is a int"),
        ('{"prompt": "a"}\n[1]', "line 2 holds a list"),
        ("", "is empty: expected records of the form"),
        ('{"messages": []}', "must be a list of objects"),
        ('{"prompt": [{"role": "user", "content": "Hi"}]}', "must be text; conversations go into `messages`"),
        ('{"prompt": "a", "completion": 3}', "must be text"),
        ('{"messages": [{"role": "user"}]}', r"record 1, message 1 \(user\): `content` is missing or null"),
        ('{"prompt": "a", "completion": []}', "the answer a list of texts"),
        ('{"prompt": "a", "completion": ["b", 3]}', "the answer a list of texts"),
        ('{"prompt": "a", "completion": "b", "options": "b"}', "`options` must be a list of texts"),
        ('{"prompt": "a", "completion": "b", "options": ["c", "d"]}', "at least two, and hold the answer 'b'"),
        ('{"prompt": "a", "completion": "b", "options": ["b"]}', "at least two"),
    ],
)
def test_anything_else_is_an_error_that_says_what_was_found(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path, text))


def test_parquet_and_datasets_give_the_records_of_jsonl(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is an optional dependency")
    table = [{"instruction": "Add", "input": str(i), "output": "3"} for i in range(5)]
    text = "".join(json.dumps(row) + "\n" for row in table)
    expected = [(r.messages, r.answer, r.input) for r in read_records(write(tmp_path, text))]
    data = datasets.Dataset.from_list(table)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    data.to_parquet(tmp_path / "files" / "train.parquet")
    for name in ("a.parquet", "saved", "splits", "files"):
        records = read_records(str(tmp_path / name))
        assert [(r.messages, r.answer, r.input) for r in records] == expected, name
        assert records[3].where == f"{tmp_path / name}, record 4"
    datasets.Dataset.from_dict({"question": ["?"]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet, record 1: found the columns \['question'\]; expected"):
        read_records(str(tmp_path / "b.parquet"))
    with pytest.raises(DataError, match=r"c.parquet is not a Parquet file"):
        read_records(write(tmp_path, "PAR", "c.parquet"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"datasets could not load .*nothing"):
        read_records(str(tmp_path / "nothing"))


def test_hub_ids_go_to_datasets_with_their_split(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is an optional dependency")
    asked = []

    def load_dataset(name, split=None):
        asked.append((name, split))
        data = datasets.Dataset.from_list([{"prompt": "Hi"}])
        return data if split else datasets.DatasetDict({"a": data, "b": data})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (record,) = read_records("org/name:train[:10]")
    assert asked == [("org/name", "train[:10]")] and record.where == "org/name:train[:10], record 1"
    with pytest.raises(DataError, match="org/name has the splits a, b: name one, as in ORG/NAME:SPLIT"):
        read_records("org/name")

    def offline(name, split=None):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="datasets could not load 'org/name': no network"):
        read_records("org/name")


def test_without_the_optional_package_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'needs the package datasets: pip install "minillm-kernels\[data\]"'):
        read_records("org/name")
    with pytest.raises(DataError, match=r'needs pyarrow: pip install "minillm-kernels\[data\]"'):
        read_records(write(tmp_path, "", "a.parquet"))


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
    (chat,) = encode(records, tokenizer, CHAT, DataConfig(), "x").examples
    assert tokenizer.decode(chat.prompt) == "[user]Hi>"
    assert tokenizer.decode(chat.response) == "Ho<eos>"
    (plain,) = encode(records, tokenizer, EvalDataConfig(prompt_template="Q: {prompt} A:"), DataConfig(), "x").examples
    assert tokenizer.decode(plain.prompt) == "Q: Hi A:"


def test_the_template_of_the_paper(tokenizer):
    """With and without input, as LMOps' processing script writes it; braces in the text are only text."""
    head = "Below is an instruction that describes a task"
    tail = "rite a response that appropriately completes the request.\n\n### Instruction:\nAdd {x}\n\n"
    plain = Record([{"role": "user", "content": "Add {x}"}], "3")
    with_input = Record([{"role": "user", "content": "Add {x}\n\n{1} 2"}], "3", "", "{1} 2")
    texts = [
        tokenizer.decode(example.prompt)
        for example in encode([plain, with_input], tokenizer, ALPACA, DataConfig(), "x").examples
    ]
    assert texts[0] == f"{head}. W{tail}### Response:\n"
    assert texts[1] == (
        f"{head}, paired with an input that provides further context. W{tail}### Input:\n{{1}} 2\n\n### Response:\n"
    )


def test_what_is_learnt_from_is_shown_by_the_mask_of_the_batch(tokenizer):
    (example,) = encode([Record([USER], "Ho")], tokenizer, CHAT, DataConfig(), "x").examples
    assert show(example, tokenizer) == "[user]Hi>⟦Ho<eos>⟧"
    assert show(example._replace(response=[]), tokenizer) == "[user]Hi>"


def test_counts_of_the_filters(tokenizer):
    data = DataConfig(max_prompt_length=20, max_response_length=3, overlong_prompts="drop", empty_answers="drop")
    contents = [("Hi", "Hello"), ("Hi", "a"), ("Hi", ""), ("long " * 9, "a"), ("Hi", None)]
    records = [Record([{"role": "user", "content": text}], answer) for text, answer in contents]
    encoded = encode(records, tokenizer, CHAT, data, "x", answers=True)
    assert str(encoded) == "2 of 5 records (1 overlong prompts left out, 2 empty answers left out, 1 answers cut)"


def test_overlong_answers_are_left_out_where_asked(tokenizer):
    data = DataConfig(max_response_length=3, overlong_answers="drop")
    records = [Record([USER], text) for text in ("Hello", "ab", "abc")]  # and the end: 6, 3 and 4 tokens
    encoded = encode(records, tokenizer, CHAT, data, "x", answers=True)
    assert [example.record.answer for example in encoded.examples] == ["ab"]
    assert str(encoded) == "1 of 3 records (2 overlong answers left out)"
    with pytest.raises(DataError, match=r"or its answer than data.max_response_length = 3"):
        encode(records[:1], tokenizer, CHAT, data, "x", answers=True)


def test_packed_rows_hold_the_same_targets_in_the_same_order():
    prompts, responses = [[1, 2, 3], [4], [5, 6], [7]], [[7, 0], [8, 9, 8, 0], [], [1, 2]]
    plain, packed = collate(prompts, responses), collate(prompts, responses, row_length=8)
    assert packed.input_ids.shape == (3, 7)  # 5 | 5 + 2 | 3
    assert packed.targets.tolist() == plain.targets.tolist()
    assert packed.input_ids.roll(-1, dims=1)[packed.predict].tolist() == packed.targets.tolist()
    assert packed.position_ids[1].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert packed.attention_mask.sum() == plain.attention_mask.sum()


def test_a_cut_answer_does_not_teach_to_stop(tokenizer):
    (example,) = encode([Record([USER], "Hello")], tokenizer, CHAT, DataConfig(max_response_length=3), "x").examples
    assert tokenizer.decode(example.response) == "Hel"


def test_overlong_prompts(tokenizer):
    records = [Record([USER], "a"), Record([{"role": "user", "content": "long " * 20}], "b", "x, record 2")]
    with pytest.raises(DataError, match=r"x: 1 of 2 prompts.*= 20 tokens; the first is x, record 2 with 107"):
        encode(records, tokenizer, CHAT, DataConfig(max_prompt_length=20), "x")
    kept = encode(records, tokenizer, CHAT, DataConfig(max_prompt_length=20, overlong_prompts="drop"), "x")
    assert [example.record.answer for example in kept.examples] == ["a"]
    assert str(kept) == "1 of 2 records (1 overlong prompts left out)"
    with pytest.raises(DataError, match="every prompt is longer"):
        encode(records[1:], tokenizer, CHAT, DataConfig(max_prompt_length=20, overlong_prompts="drop"), "x")


def test_a_tokenizer_without_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"has no chat template: set data.prompt_template"):
        encode([Record([USER], "a")], tokenizer, CHAT, DataConfig(), "x")


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
