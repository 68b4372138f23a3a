"""Command line. Heavy imports happen inside the commands, so that --help answers at once."""

import argparse
import errno
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from minillm.teach import add_arguments, teach
from minillm.terminal import print_anything, printable, quiet_libraries, say, silence, unbroken_output

if TYPE_CHECKING:
    from minillm.config.recipe import Recipe
    from minillm.config.schema import ModelConfig


NO_DOCTOR = "train without trying the loss on a few answers first"
RESUME = "go on from a checkpoint; auto: the newest of this recipe's last run, or from the start where there is none"


ADVICE = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "Make room",
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "Name a place that may be read and written (--output, --out, or MINILLM_CACHE for what is fetched)",
    ),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP),
        "A file or a link stands where a directory is needed, or the reverse: name another path",
    ),
    errno.ENAMETOOLONG: "Name a shorter path",
}
"""What to do about what the system says."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point `minillm`; user errors end with one message and status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    print_anything()
    options, flags = _parser().parse_known_args(arguments)
    options.command_line = printable(shlex.join(["minillm", *arguments]))
    try:
        return options.run(options, flags)
    except _user_errors() as error:
        say(f"minillm: {error}", error=True)
        return 2
    except BrokenPipeError:  # whoever read the output has had enough
        silence(sys.stdout)
        return 0
    except OSError as error:  # of the system, about a file or a connection
        advice = ADVICE.get(error.errno or 0, "")
        if hasattr(options, "resume") and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice += ", then --resume auto goes on from the last checkpoint"
        say(f"minillm: {error}. {advice}".removesuffix(". "), error=True)
        return 2


def _run(recipe: "Recipe", options: argparse.Namespace, with_evaluation: bool = True) -> int:
    """A recipe under signals that ask to stop: the training loop saves first, elsewhere nothing is lost."""
    from minillm.distillation import run_recipe
    from minillm.run.interrupt import Interrupted, exit_on_signal
    from minillm.run.workers import WorkerLost, first_process_tells

    quiet_libraries()
    try:
        with first_process_tells():
            try:
                with exit_on_signal():
                    run_recipe(recipe, options.command_line, with_evaluation, options.resume, options.doctor)
            except Interrupted as stop:
                say(f"stopped. {stop}")
    except WorkerLost as lost:
        say(f"minillm: {lost}", error=True)
        os._exit(2)  # the usual way out waits for the process that is gone
    return 0


def distill(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.config.recipe import load_recipe

    return _run(load_recipe(options.recipe, flags, smoke=options.smoke), options)


def train(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.config.recipe import load_recipe

    return _run(load_recipe(options.config, flags), options, with_evaluation=False)


def evaluate(options: argparse.Namespace, flags: list[str]) -> int:
    import dataclasses
    import json
    from pathlib import Path

    import minillm
    from minillm.config.recipe import parse_flags
    from minillm.files import check_writable, flatten, write_atomically
    from minillm.report.summary import evaluation_text

    if options.out:
        check_writable(Path(options.out))  # before the work
    overrides = dict(flatten(parse_flags(flags)))
    result = minillm.evaluate(
        options.model, options.data, teacher=options.teacher, tokenizer=options.tokenizer, **overrides
    )
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return 0
    result = dataclasses.replace(result, about=result.about | {"command": options.command_line})
    text = json.dumps(result.to_dict(per_prompt=bool(options.out)), indent=1, ensure_ascii=not options.out)
    if options.out:
        write_atomically(Path(options.out), text + "\n")
        text = f"{evaluation_text(result)}\n\nall of it is in {options.out}"
    say(text.replace("\x7f", "\\u007f"))  # the one control character that JSON does not write as a code
    return 0


def report(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.config.schema import ConfigError
    from minillm.report.page import write_report

    if flags:
        raise ConfigError(f"report does not know {flags[0]!r}; see minillm report --help")
    say(f"wrote {write_report(options.runs, options.out)}")
    return 0


def study(options: argparse.Namespace, flags: list[str]) -> int:
    from pathlib import Path

    from minillm.config.schema import ConfigError
    from minillm.study.plan import load_study

    if flags:
        raise ConfigError(f"study does not know {flags[0]!r}; its settings are those of the YAML file")
    plan = load_study(options.study, options.profile or "")
    if options.list:
        say("\n".join(f"{'done' if plan.result(c).exists() else '    '}  {c.path}" for c in plan.cells()))
        return 0
    if options.report:
        from minillm.study.document import write_document

        command = f"minillm study {options.study}{f' --{options.profile}' if options.profile else ''} --report"
        say(f"wrote {write_document(plan, Path(options.report), command)}")
        return 0
    from minillm.run.interrupt import Interrupted, exit_on_signal
    from minillm.study.cell import run_next

    quiet_libraries()
    try:
        with unbroken_output(), exit_on_signal():
            while plan.unfinished():
                written = run_next(plan, options.command_line)
                say(f"wrote {written}" if written else "other runs are at all cells that could run now")
                if not options.all:
                    break
                if not written:
                    time.sleep(30)
    except Interrupted:
        say("stopped; the same command goes on")
        return 0
    say(f"{len(plan.unfinished())} of {len(plan.cells())} cells left")
    return 0


def generate(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.config.check import check_seed
    from minillm.config.schema import ConfigError

    if flags:
        raise ConfigError(f"generate does not know {flags[0]!r}; see minillm generate --help")
    check_seed("--seed", options.seed)
    for name, allowed, wanted in (
        ("max_prompt_length", options.max_prompt_length >= 1, "at least 1"),
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= options.temperature < math.inf, "a number of at least 0"),
        ("top_p", 0 < options.top_p <= 1, "above 0 and at most 1"),
    ):
        if not allowed:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is {getattr(options, name)}; it must be {wanted}")
    prompts = _prompts(options.prompt)
    quiet_libraries()
    from minillm.config.schema import DataConfig, EvalDataConfig, ModelConfig
    from minillm.data.examples import encode, to_record
    from minillm.model.check import check_context, check_decoding
    from minillm.model.load import end_tokens, load_tokenizer
    from minillm.model.sampling import Decoding, decode, draw_uniforms, sample

    tokenizer, model = load_tokenizer(options.model), _open(options.model, ModelConfig(head="logits"))  # any head
    template = EvalDataConfig(prompt_template=options.template)
    check_decoding(model)
    limits = DataConfig(max_prompt_length=options.max_prompt_length)
    ends = end_tokens(tokenizer, template, [model.model])
    for i, (where, prompt) in enumerate(prompts):
        record = to_record({"prompt": prompt}, where)
        (example,) = encode([record], tokenizer, template, limits, where).examples
        tokens = len(example.prompt) + options.max_new_tokens
        check_context(model.model, tokens, "--max-prompt-length or --max-new-tokens")
        rollout = sample(
            model,
            None,
            [example.prompt],
            Decoding(options.max_new_tokens, ends, options.temperature, top_p=options.top_p),
            alpha=0.0,
            uniforms=draw_uniforms(options.seed + i, options.max_new_tokens, 1),
        )
        (response,) = decode(tokenizer, rollout.responses())
        if not say(response):
            break  # nobody reads any more
    return 0


def estimate(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.config.recipe import load_recipe

    recipe = load_recipe(options.config, flags, smoke=options.smoke)
    quiet_libraries()
    if options.gpus:
        from minillm.model.forecast import describe_mesh

        say(describe_mesh(recipe, options.gpus))
        return 0
    from minillm.model.cost import describe

    say(describe(recipe))
    return 0


def doctor(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.config.recipe import load_recipe

    recipe = load_recipe(options.recipe, flags, smoke=options.smoke)
    quiet_libraries()
    from minillm.distillation import diagnose
    from minillm.doctor import describe

    found = diagnose(recipe)
    for name, findings in found.items():
        say(f"{name} ({recipe.stages[name].method})\n{describe(findings)}")
    return 2 if any(finding.status == "wrong" for findings in found.values() for finding in findings.values()) else 0


def export(options: argparse.Namespace, flags: list[str]) -> int:
    from pathlib import Path

    from minillm.config.schema import ConfigError

    if flags:
        raise ConfigError(f"export does not know {flags[0]!r}; see minillm export --help")
    quiet_libraries()
    from minillm.run.export import export as write

    source, run = Path(options.checkpoint) if options.checkpoint else None, Path(options.run_directory)
    output = Path(options.output) if options.output else run / "export"
    say(f"{output} holds the student of {write(run, source, output)}")
    return 0


def env(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.run.directory import environment

    for name, value in environment().items():
        if isinstance(value, dict):
            say(f"{name}:")
            for key, state in value.items():
                say(f"  {key}: {state}")
        else:
            say(f"{name}: {value}")
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

    override = "Any key of minillm/config/schema.py can be overridden: --section.key=value"
    sub = command("distill", distill, "run a recipe: stages in order, evaluated before and after each", override)
    sub.add_argument("recipe", help="YAML file, such as recipes/smollm2-cpu.yaml")
    sub.add_argument("--smoke", action="store_true", help="apply the recipe's `smoke:` section, which makes it short")
    sub.add_argument("--resume", default="", metavar="auto|PATH", help=RESUME)
    sub.add_argument("--no-doctor", dest="doctor", action="store_false", help=NO_DOCTOR)
    sub = command("train", train, "train without evaluation", override)
    sub.add_argument("config", help="YAML file")
    sub.add_argument("--resume", default="", metavar="auto|PATH", help=RESUME)
    sub.add_argument("--no-doctor", dest="doctor", action="store_false", help=NO_DOCTOR)
    sub = command("evaluate", evaluate, "measure a model on prompts with reference answers", override)
    sub.add_argument("model", help="hub id, directory, package:NAME, or the address of a server of `minillm teach`")
    sub.add_argument("--tokenizer", help="of such a server: a model whose tokenizer it has")
    sub.add_argument("--data", required=True, help="prompts with answers: file, directory, hub id or package:NAME")
    sub.add_argument("--teacher", help="also measure divergences and exposure bias against this model")
    sub.add_argument("--out", help="write the JSON here and print a table; without it, the JSON is printed")
    sub = command("report", report, "one page of tables and figures from runs and evaluations")
    sub.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or JSON file of minillm evaluate --out")
    sub.add_argument("--out", default="report", help="directory for index.html and the figures (default report)")
    sub = command("study", study, "run the next unfinished cell of a study, or make its page")
    sub.add_argument("study", help="YAML file, such as recipes/study/study.yaml")
    sub.add_argument("--list", action="store_true", help="show the cells, run nothing")
    sub.add_argument("--all", action="store_true", help="run all unfinished cells, not one")
    sub.add_argument(
        "--report", nargs="?", const="docs/study.md", metavar="FILE", help="write the page (docs/study.md)"
    )
    for name, what in (("smoke", "makes it short"), ("card", "is for a GPU")):
        help = f"apply the study's `{name}:` section, which {what}"
        sub.add_argument(f"--{name}", dest="profile", action="store_const", const=name, help=help)
    sub = command("generate", generate, "answer one prompt, or each line of standard input")
    sub.add_argument("model", help="hub id, directory or package:NAME")
    sub.add_argument("--prompt", help="the prompt; without it, lines of standard input")
    sub.add_argument("--template", default="chat", help="`chat`, or a text with {prompt}")
    sub.add_argument("--max-prompt-length", type=int, default=1024, help="tokens (default 1024)")
    sub.add_argument("--max-new-tokens", type=int, default=128, help="tokens (default 128)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    sub.add_argument("--top-p", type=float, default=1.0, help="nucleus mass (default 1: all)")
    sub.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    sub = command(
        "estimate", estimate, "count the memory and the work of a recipe without loading its weights", override
    )
    sub.add_argument("config", help="YAML file")
    sub.add_argument("--smoke", action="store_true", help="of the short form of the recipe")
    sub.add_argument(
        "--gpus", metavar="8xh100", help="forecast memory and time per step there, for each placement of the models"
    )
    sub = command("doctor", doctor, "check in a minute that the loss of a recipe is the one that is meant", override)
    sub.add_argument("recipe", help="YAML file, such as recipes/smollm2-cpu.yaml")
    sub.add_argument("--smoke", action="store_true", help="of the short form of the recipe")
    add_arguments(command("teach", teach, "serve a teacher, or keep what it says of data, for students elsewhere"))
    sub = command("export", export, "write a run's student as a plain model directory, adapters merged")
    sub.add_argument("run_directory", metavar="RUN", help="run directory")
    sub.add_argument("--checkpoint", help="RUN/checkpoints/step-N; by default the run's end, or how far it came")
    sub.add_argument("--output", help="directory to write (default RUN/export)")
    command("env", env, "print versions, hardware and kernel backends, for bug reports")
    return parser


def _user_errors() -> tuple[type[Exception], ...]:
    from minillm.config.schema import ConfigError
    from minillm.data.packages import PackageError
    from minillm.data.sources import DataError
    from minillm.lost import ServerLost
    from minillm.run.checkpoint import CheckpointError

    return ConfigError, DataError, PackageError, CheckpointError, ServerLost, FileNotFoundError, FloatingPointError


def _prompts(given: str | None) -> Iterable[tuple[str, str]]:
    """The prompt of the command line, or the lines of standard input, in UTF-8; each with where it stands."""
    import io

    from minillm.config.schema import ConfigError

    if given is not None:
        if not given.strip():
            raise ConfigError("--prompt is empty: give a text, or leave --prompt out to read standard input")
        return [("the prompt", os.fsencode(given).decode(errors="surrogateescape"))]
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # to_record says what is not UTF-8
    return ((f"standard input, line {i}", line.rstrip("\n")) for i, line in enumerate(sys.stdin or (), 1))


def _open(source: str, settings: "ModelConfig") -> Any:
    """A model on the accelerator, where there is one."""
    from accelerate import PartialState

    from minillm.model.check import check_forward
    from minillm.model.head import CausalLM
    from minillm.model.load import load_model

    model = load_model(source, settings.dtype, settings.attn).to(PartialState().device)
    check_forward(model)
    return CausalLM(model, settings.head)


if __name__ == "__main__":
    sys.exit(main())
