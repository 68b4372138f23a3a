"""Command line. Heavy imports happen inside the commands, so that --help answers at once."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point `minillm`; user errors end with one message and status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options, flags = _parser().parse_known_args(arguments)
    options.command_line = shlex.join(["minillm", *arguments])
    try:
        return options.run(options, flags)
    except _user_errors() as error:
        print(f"minillm: {error}", file=sys.stderr)
        return 2


def distill(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.config import load_recipe

    recipe = load_recipe(options.recipe, flags, smoke=options.smoke)
    _quiet()
    from minillm.distill import run_recipe

    run_recipe(recipe, options.command_line)
    return 0


def train(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.config import load_recipe

    recipe = load_recipe(options.config, flags)
    _quiet()
    from minillm.distill import run_recipe

    run_recipe(recipe, options.command_line, with_evaluation=False)
    return 0


def evaluate(options: argparse.Namespace, flags: list[str]) -> int:
    import json

    from minillm.config import config_from, parse_flags

    tree = parse_flags(flags)
    tree.setdefault("data", {})["eval"] = options.data
    config = config_from(tree)
    _quiet()
    from minillm.evaluate import evaluate, held_out
    from minillm.models import check_same_tokenizer, load_tokenizer

    tokenizer = load_tokenizer(options.model)
    examples = held_out(config, tokenizer)
    student, teacher = _open(options.model, config.model.head), None
    if options.teacher:
        check_same_tokenizer(tokenizer, load_tokenizer(options.teacher))
        teacher = _open(options.teacher, config.model.head)
    result = evaluate(student, teacher, tokenizer, examples, config)
    print(json.dumps({name: estimate.to_dict() for name, estimate in result.estimates.items()}, indent=1))
    return 0


def generate(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.config import ConfigError

    if flags:
        raise ConfigError(f"generate does not know {flags[0]!r}; see minillm generate --help")
    _quiet()
    from minillm.config import Data
    from minillm.data import Record, encode
    from minillm.models import load_tokenizer
    from minillm.rollout import draw_uniforms, sample

    tokenizer, model = load_tokenizer(options.model), _open(options.model, "logits")  # any model, whatever its head
    data = Data(prompt_template=options.template, max_prompt_length=options.max_prompt_length)
    prompts = [options.prompt] if options.prompt else (line.rstrip("\n") for line in sys.stdin)
    for i, prompt in enumerate(prompts):
        (example,) = encode([Record([{"role": "user", "content": prompt}], None)], tokenizer, data, "the prompt")
        rollout = sample(
            model,
            None,
            [example.prompt],
            max_new_tokens=options.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            alpha=0.0,
            temperature=options.temperature,
            top_p=options.top_p,
            uniforms=draw_uniforms(options.seed + i, options.max_new_tokens, 1),
        )
        (answer,) = tokenizer.batch_decode(rollout.responses(), skip_special_tokens=True)
        print(answer.strip(), flush=True)
    return 0


def env(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.run import environment

    for name, value in environment().items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, state in value.items():
                print(f"  {key}: {state}")
        else:
            print(f"{name}: {value}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minillm", description="Distil language models by sequence-level reverse KL."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, override: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=override, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    override = "Any key of minillm/config.py can be overridden: --section.key=value"
    sub = command("distill", distill, "run a recipe: stages in order, evaluated before and after each", override)
    sub.add_argument("recipe", help="YAML file, such as recipes/smollm2-cpu.yaml")
    sub.add_argument("--smoke", action="store_true", help="apply the recipe's `smoke:` section, which makes it short")
    sub = command("train", train, "train without evaluation", override)
    sub.add_argument("config", help="YAML file")
    sub = command("evaluate", evaluate, "measure a model on prompts with reference answers", override)
    sub.add_argument("model", help="hub id, directory or package:NAME")
    sub.add_argument("--data", required=True, help="JSONL file or package:NAME")
    sub.add_argument("--teacher", help="also measure the reverse KL to this model")
    sub = command("generate", generate, "answer one prompt, or each line of standard input")
    sub.add_argument("model", help="hub id, directory or package:NAME")
    sub.add_argument("--prompt", help="the prompt; without it, lines of standard input")
    sub.add_argument("--template", default="chat", help="`chat`, or a text with {prompt}")
    sub.add_argument("--max-prompt-length", type=int, default=1024, help="tokens (default 1024)")
    sub.add_argument("--max-new-tokens", type=int, default=128, help="tokens (default 128)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    sub.add_argument("--top-p", type=float, default=1.0, help="nucleus mass (default 1: all)")
    sub.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    command("env", env, "print versions, hardware and kernel backends, for bug reports")
    return parser


def _user_errors() -> tuple[type[Exception], ...]:
    from minillm.config import ConfigError
    from minillm.data import DataError
    from minillm.packages import PackageError

    return ConfigError, DataError, PackageError, FileNotFoundError, FloatingPointError


def _open(source: str, head: str) -> Any:
    """A model on the accelerator, where there is one."""
    from accelerate import PartialState

    from minillm.models import load_model
    from minillm.vocabulary import CausalLM

    return CausalLM(load_model(source).to(PartialState().device), head)


def _quiet() -> None:
    """No progress bars of loading and saving between our lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
