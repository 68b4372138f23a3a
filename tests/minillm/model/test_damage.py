"""Model directories that are damaged, hostile or absurd: one error, soon, that says which file."""

import json
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from minillm.cli import main
from minillm.config.schema import ConfigError, EvalDataConfig
from minillm.data.examples import DataError
from minillm.data.prompts import encode_prompt
from minillm.data.records import to_record
from minillm.model import bounds
from minillm.model.check import check_forward
from minillm.model.head import CausalLM
from minillm.model.load import end_tokens, load_model, load_tokenizer, skeleton

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456789\n"
VALUES = (None, True, -1, 3, 10**9, 10**13, 0.5, "x", "\x1b[2J", [], [3], ["x"], {}, {"x": 3})


@pytest.fixture
def student(make_llama, make_tokenizer, tmp_path):
    make_llama(1).save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def use(source):
    """All that a command does with a model before its work, and a step of that."""
    tokenizer, model = load_tokenizer(source), load_model(source)
    settings = EvalDataConfig()
    encode_prompt(to_record({"prompt": "hello"}, "a.jsonl, record 1"), tokenizer, settings)
    ends = end_tokens(tokenizer, settings, [model])
    torch.tensor(ends)
    check_forward(model)


def outcome(folder):
    """ "" where the model can be used, else the one error."""
    try:
        use(str(folder))
    except (ConfigError, DataError) as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1500, text
        return text
    return ""


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---- damaged files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (POINTER, "is a pointer of Git LFS, not the file itself: git lfs pull"),
        (b"<html>404</html>", "is not JSON|is damaged"),
        (b"[" * 99_999, "is not JSON|is damaged"),
        (b"[]", "holds a list|is damaged"),
        (None, "is no file"),
    ],
    ids=["empty", "lfs", "html", "deep", "list", "directory"],
)
def test_the_damaged_file_is_named(student, name, content, why):
    (student / name).unlink()
    (student / name).mkdir() if content is None else (student / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"could be loaded from .*student/{re.escape(name)} .*({why})"):
        use(str(student))


@pytest.mark.parametrize("content", [b"", POINTER, b"{", b"[]", b"\xff"])
def test_end_tokens_are_not_lost_with_a_damaged_file(student, content):
    (student / "generation_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"student/generation_config.json .*, or delete it"):
        load_model(str(student))
    (student / "generation_config.json").unlink()
    use(str(student))


def test_half_a_download(student):
    content = (student / "model.safetensors").read_bytes()
    (student / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"student/model.safetensors is damaged: .*: get it again"):
        load_model(str(student))


def test_bytes_that_change_anywhere(student, tmp_path):
    """Each file, cut or with some bytes changed: it can be used, or there is one error."""
    failed = 0
    for path in sorted(student.iterdir()):
        content = path.read_bytes()
        for seed in range(8):
            draw = random.Random(seed)
            damaged = bytearray(content if seed % 2 else content[: draw.randrange(len(content))])
            for _ in range(seed % 2 * draw.choice((1, 3, 20))):
                damaged[draw.randrange(min(len(damaged), 3000))] = draw.randrange(256)
            path.write_bytes(damaged)
            failed += bool(outcome(student))
        path.write_bytes(content)
    assert failed > 20 and not outcome(student)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_values_that_change_anywhere(student, name):
    """JSON that is whole, with values of another kind or size."""
    path = student / name
    content = path.read_text()

    def places(tree, above=()):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*above, key)
            if isinstance(value, (dict, list)):
                yield from places(value, (*above, key))

    every = [place for place in places(json.loads(content)) if "vocab" not in place[:-1]]
    draw = random.Random(0)
    for place, value in draw.sample([(place, value) for place in every for value in VALUES], 60):
        tree = json.loads(content)
        node = tree
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
        path.write_text(json.dumps(tree))
        started = time.perf_counter()
        outcome(student)
        assert time.perf_counter() - started < 60, (place, value)


def test_weights_and_configuration_that_do_not_belong_together(student):
    edit(student / "config.json", vocab_size=300)
    with pytest.raises(
        ConfigError, match=r"hold lm_head.weight with the shape \[257, 32\], and its config.json .*\[300, 32\]"
    ):
        load_model(str(student))


def test_an_end_token_that_is_no_id(student):
    for wrong in ("abc", [0, "a"], 1.5, -1, [[0]]):
        edit(student / "generation_config.json", eos_token_id=wrong)
        assert outcome(student)


# ---- absurd sizes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000: it is damaged"),
        ({"num_hidden_layers": 9_999}, "that is not built after|describes a model of more than"),
        ({"num_hidden_layers": 0}, "has 0 layers"),
        ({"num_hidden_layers": -1}, "has -1 layers"),
        ({"vocab_size": 10**12}, "describes a model of more than .* GiB"),
        ({"intermediate_size": 10**12}, "describes a model of more than .* GiB"),
        ({"hidden_size": 10**9}, "describes a model of more than .* GiB"),
        ({"vocab_size": 10**30}, "could be loaded"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_no_memory_is_taken_for_a_model_that_cannot_be(student, monkeypatch, values, message):
    monkeypatch.setattr(bounds, "SECONDS", 1)
    edit(student / "config.json", **values)
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=message):
        load_model(str(student))
    assert time.perf_counter() - started < 30


def test_the_bound_is_for_building_alone(make_llama, student):
    size = sum(p.nbytes for p in load_model(str(student)).parameters())
    with pytest.raises(ConfigError, match="describes a model of more than"), bounds.bounded("x", room=size - 1):
        load_model(str(student))
    with bounds.bounded("x", room=0):
        make_llama(1)  # with memory, not on the meta device
    with torch.device("meta"):  # minillm estimate counts what is too large for this machine
        assert skeleton(str(student)).num_parameters() > 0


def test_a_configuration_that_its_weights_allow_and_no_input(tmp_path, make_tokenizer):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", num_experts_per_tok=10**9)
    with pytest.raises(ConfigError, match="MixtralForCausalLM cannot compute as its configuration says"):
        use(str(tmp_path))
    with pytest.raises(ConfigError, match=r"MixtralForCausalLM cannot be read before its head \(.*selected index"):
        CausalLM(load_model(str(tmp_path)))


# ---- weights from elsewhere


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "../student/x.safetensors", "/x.safetensors", "a\\b.safetensors", "..", 3, ["x"], None],
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "other.safetensors.index.json"])
def test_an_index_names_safetensors_files_beside_it(student, name, index):
    (student / "model.safetensors").rename(student / "x.safetensors")
    (student / index).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    if index.startswith("other"):
        edit(student / "config.json", transformers_weights=index)
    with pytest.raises(ConfigError, match=rf"{index} names the file .*; only safetensors files"):
        load_model(str(student))


@pytest.mark.parametrize(
    "tree", [3, [], {}, {"weight_map": []}, {"weight_map": None}, {"weight_map": {"a": "a.safetensors"}}]
)
def test_an_index_that_is_none(student, tree):
    (student / "model.safetensors").rename(student / "x.safetensors")
    (student / "model.safetensors.index.json").write_text(json.dumps(tree))
    with pytest.raises(
        ConfigError, match=r"index.json (holds|has no `(weight_map|metadata)`).*expected an index of safetensors"
    ):
        load_model(str(student))


@pytest.mark.parametrize("name", ["adapter_model.bin", "../x.safetensors", "x.bin", 3, None])
def test_a_configuration_names_safetensors_files_beside_it(student, name):
    edit(student / "config.json", transformers_weights=name)
    with pytest.raises(ConfigError, match=r"names the weights .*; only safetensors files"):
        load_model(str(student))


def test_what_a_model_says_steers_no_terminal(student, capfd):
    edit(student / "config.json", model_type="\x1b]0;title\x07", architectures=["\x9b2J"])
    assert main(["generate", str(student), "--prompt", "a"]) == 2
    edit(student / "config.json", model_type="llama", hidden_act="\x1b[2J")
    assert main(["generate", str(student), "--prompt", "a"]) == 2
    shutil.rmtree(student)
    assert main(["generate", f"{student}\x1b[2J", "--prompt", "a"]) == 2
    out, err = capfd.readouterr()
    assert "\\x1b" in err and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out + err)
    assert not Path("\x1b[2J").exists()
