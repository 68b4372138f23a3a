import io
import json
import re
import subprocess
import sys
import time

import pytest

from minillm.cli import main


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def test_help_is_quick():
    """In a process of its own: nothing heavy may be imported to show the help."""
    code = (
        "import sys; from minillm.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n") and "distill" in result.stdout
    assert time.perf_counter() - started < 5  # measured 0.03 s; a loaded machine may be slow to start python


def test_smoke_distillation_then_generate_and_evaluate(files, capsys):
    status, out, _ = run(capsys, "distill", files / "recipe.yaml", "--smoke")
    assert status == 0 and "minillm  1/1" in out
    model = files / "run" / "model"
    status, out, _ = run(capsys, "generate", model, "--prompt", "Say a", "--max-new-tokens", "4")
    assert status == 0
    status, out, _ = run(
        capsys, "evaluate", model, "--data", files / "eval.jsonl", "--teacher", files / "teacher",
        "--eval.prompts=4", "--eval.samples=2", "--eval.sample_tokens=4", "--eval.greedy_tokens=4",
    )  # fmt: skip
    assert status == 0
    found = json.loads(out)
    assert found["reverse_kl"]["own_samples"]["prompts"] == 4
    status, out, _ = run(
        capsys, "evaluate", model, "--data", files / "eval.jsonl", "--teacher", files / "teacher",
        "--eval.prompts=4", "--eval.samples=2", "--eval.sample_tokens=4", "--eval.greedy_tokens=4",
        "--model.head=logits",
    )  # fmt: skip
    assert status == 0
    again = json.loads(out)
    for kl in ("reverse_kl", "forward_kl"):
        for along, estimate in again[kl].items():
            assert estimate["mean"] == pytest.approx(found[kl][along]["mean"], rel=1e-4, abs=1e-5)


def test_train_does_without_evaluation(files, capsys):
    status, out, _ = run(capsys, "train", files / "recipe.yaml", "--data.eval=", "--optim.steps=1")
    assert status == 0
    assert "evaluating" not in out and (files / "run" / "model" / "config.json").exists()


def test_generate_reads_standard_input(files, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", iter(["one\n", "two\n"]))
    status, _, _ = run(capsys, "generate", files / "student", "--max-new-tokens", "2")
    assert status == 0


@pytest.mark.parametrize("prompt", ["", " "])
def test_an_empty_prompt_does_not_wait_for_standard_input(files, capsys, monkeypatch, prompt):
    monkeypatch.setattr("sys.stdin", iter(["this would be answered\n"]))
    status, out, err = run(capsys, "generate", files / "student", "--prompt", prompt)
    assert status == 2 and not out and err.startswith("minillm: --prompt is empty")


def test_generate_names_the_line_and_prints_no_control_characters(files, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"gr\xc3\xb6\xc3\x9fer\n\xe9\n"), encoding="ascii")
    monkeypatch.setattr("sys.stdin", stdin)
    status, out, err = run(capsys, "generate", files / "student", "--max-new-tokens", "40", "--temperature", "1")
    assert status == 2 and "standard input, line 2 holds" in err
    assert out and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)
    status, _, err = run(capsys, "generate", files / "student", "--prompt", "a", "--seed", str(2**63))
    assert status == 2 and "a seed lies in" in err


def test_env_names_backends_and_versions(capsys):
    status, out, _ = run(capsys, "env")
    assert status == 0
    assert "torch: " in out and "  reference: ok" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optm.lr=1"], "did you mean 'optim'"),
        (["--optim.lr", "1"], "--section.key=value"),
        (["--data.train=none.jsonl"], "no data at 'none.jsonl'"),
        (["--data.train=package:none"], "no data set called package:none; known: package:alpaca"),
        (["--data.max_prompt_length=10"], "longer than data.max_prompt_length = 10 tokens"),
        (["--data.max_prompt_length=600"], "LlamaForCausalLM has 512 positions"),
        (["--data.eval="], "data.eval is empty"),
        (["--eval.prompts=9"], "eval.prompts asks for 9"),
        (["--model.student=."], "could be loaded from '.'"),
        (["--objective.pt_length=99999"], "fewer than one chunk"),
    ],
)
def test_errors_come_before_any_work(files, capsys, flags, message):
    status, out, err = run(capsys, "distill", files / "recipe.yaml", *flags)
    assert status == 2
    assert err.startswith("minillm: ") and message in err and "Traceback" not in err
    assert "evaluating" not in out and not (files / "run").exists()


def test_empty_data_and_unequal_tokenizers(files, capsys, make_tokenizer):
    (files / "empty.jsonl").write_text("")
    status, _, err = run(capsys, "distill", files / "recipe.yaml", f"--data.train={files / 'empty.jsonl'}")
    assert status == 2 and "empty.jsonl is empty" in err
    make_tokenizer(reverse=True).save_pretrained(files / "student")
    status, _, err = run(capsys, "distill", files / "recipe.yaml")
    assert status == 2 and "teacher and student have different tokenizers" in err


def test_a_run_is_never_overwritten(files, capsys):
    (files / "run").mkdir()
    (files / "run" / "precious").touch()
    status, _, err = run(capsys, "distill", files / "recipe.yaml", "--smoke")
    assert status == 2 and "is not empty: give another --output" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1"),
        (["--max-prompt-length", "-1"], "--max-prompt-length is -1"),
        (["--temperature", "nan"], "--temperature is nan; it must be a number of at least 0"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--top-p", "7"], "--top-p is 7.0; it must be above 0 and at most 1"),
        (["--top-p", "nan"], "--top-p is nan"),
        (["--max-new-tokens", "600"], "has 512 positions: lower --max-prompt-length or --max-new-tokens"),
    ],
)
def test_generate_refuses_what_it_cannot_do(files, capsys, flags, message):
    status, out, err = run(capsys, "generate", files / "student", "--prompt", "a", *flags)
    assert status == 2 and not out and message in err and err.count("\n") == 1


SHORT = ("--eval.prompts=2", "--eval.samples=1", "--eval.sample_tokens=2", "--eval.greedy_tokens=2")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "recipe.yaml", "--output=file"], "Not a directory"),
        (["train", "recipe.yaml", "--output=file/x"], "Not a directory"),
        (["train", "recipe.yaml", "--output=" + "a" * 300], "File name too long"),
        (["train", "recipe.yaml", "--output=loop"], "name another path"),
        (["train", "a" * 5000], "File name too long"),
        (["train", "recipe.yaml", "--data.train=" + "a" * 5000], "File name too long"),
        (["train", "recipe.yaml", "--data.train=/dev/null"], "is neither a file nor a directory: write what comes"),
        (["train", "recipe.yaml", "--data.train=package:alpaca"], "Not a directory"),
        (["train", "recipe.yaml", "--model.student=package:smollm2-135m-instruct"], "Not a directory"),
        (["evaluate", "student", "--data", "eval.jsonl", *SHORT, "--out", "."], "it is a directory, and a file is"),
        (["evaluate", "student", "--data", "eval.jsonl", *SHORT, "--out", "file/x"], "Not a directory"),
        (["report", "result.json", "--out", "file"], "Not a directory"),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_one_message(files, capsys, monkeypatch, command, message):
    monkeypatch.chdir(files)
    (files / "file").touch()
    (files / "loop").symlink_to("loop")
    (files / "result.json").write_text('{"prompts": 1, "generation": {}}')
    monkeypatch.setenv("MINILLM_CACHE", str(files / "file"))
    status, out, err = run(capsys, *command)
    assert status == 2 and err.startswith("minillm: ") and message in err and err.count("\n") == 1
    assert "evaluating" not in out


def test_without_a_home_the_cache_is_named(files, capsys, monkeypatch):
    monkeypatch.delenv("MINILLM_CACHE", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # of a user whom the system does not know
    status, _, err = run(capsys, "train", files / "recipe.yaml", "--data.train=package:alpaca")
    assert status == 2 and "this user has no home directory: set MINILLM_CACHE" in err


def test_our_own_errors_are_not_hidden(files, monkeypatch):
    def wrong(*arguments, **settings):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr("minillm.data.examples.encode", wrong)
    with pytest.raises(KeyError, match="a mistake of ours"):
        main(["generate", str(files / "student"), "--prompt", "a"])
