"""`minillm teach`: a teacher for others, as a server or as what it says of given data. It imports nothing heavy."""

import argparse
import os
import socket
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from minillm.config.teacher import TOKEN
from minillm.terminal import quiet_libraries, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXTRA = 'pip install "minillm-kernels[teach]"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="hub id, directory or package:NAME")
    parser.add_argument("--dtype", default="checkpoint", help="float32, bfloat16, float16, or as stored (default)")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a forward pass (default 16384)")
    server = parser.add_argument_group("a server (without --out)")
    server.add_argument("--host", default="127.0.0.1", help=f"other than this machine alone needs ${TOKEN}")
    server.add_argument("--port", type=int, default=8080, help="0: a free one (default 8080)")
    server.add_argument("--request-tokens", type=int, default=65536, help="of one question (default 65536)")
    server.add_argument("--queue", type=int, default=64, help="questions that may wait (default 64)")
    server.add_argument("--cache-tokens", type=int, default=1 << 18, help="kept of rollouts (default 262144)")
    stored = parser.add_argument_group(
        "what it says of data (with --out; --data.KEY=VALUE as in the student's recipe)"
    )
    stored.add_argument("--data", help="prompts with answers: file, directory, hub id or package:NAME")
    stored.add_argument("--out", help="directory to write, for model.teacher; the same command goes on with it")
    stored.add_argument("--top-k", type=int, default=0, help="keep the k most likely tokens, not hidden states")
    stored.add_argument("--temperature", type=float, default=1.0, help="of the top tokens' log-probs (default 1)")
    stored.add_argument(
        "--states", default="auto", help="type of hidden states: float8, bfloat16, … (auto: the model's)"
    )
    stored.add_argument("--student", help="measure on a sample what --top-k leaves out of the loss of this student")


def teach(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.config.check import DTYPES, one_of
    from minillm.config.schema import ConfigError

    one_of("--dtype", options.dtype, ("checkpoint", *DTYPES))
    for name in ("max_tokens", "request_tokens", "queue", "cache_tokens"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    if options.out or options.data:
        return _store(options, flags)
    if flags:
        raise ConfigError(f"teach does not know {flags[0]!r}; see minillm teach --help")
    return _serve(options)


def _serve(options: argparse.Namespace) -> int:
    """Serve until a signal asks to stop; what has been asked by then is answered."""
    from minillm.config.schema import ConfigError

    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"serving a teacher needs {error.name}: {EXTRA}") from error
    token = os.environ.get(TOKEN, "")
    if not token and not _is_here(options.host):
        raise ConfigError(
            f"--host {options.host} lets other machines ask: set the environment variable {TOKEN} to a secret, here "
            "and where the students are trained"
        )
    listening = _listen(options.host, options.port)
    quiet_libraries()
    from minillm.model.head import CausalLM
    from minillm.model.load import load_tokenizer
    from minillm.run.interrupt import Interrupted, exit_on_signal
    from minillm.teacher.server import TeacherServer

    try:
        with exit_on_signal():
            lm, tokenizer = CausalLM(_loaded(options.model, options.dtype)), load_tokenizer(options.model)
            limits = (options.max_tokens, options.request_tokens, options.queue, options.cache_tokens)
            server = TeacherServer(lm, tokenizer, options.model, token, *limits)
            config = uvicorn.Config(
                server.app,
                log_config=None,
                access_log=False,
                limit_concurrency=4 * options.queue,
                timeout_graceful_shutdown=60,
                server_header=False,
            )
            host, port = listening.getsockname()[:2]
            say(f"{options.model} teaches on http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C stops it")
            uvicorn.Server(config).run(sockets=[listening])
    except (Interrupted, KeyboardInterrupt):
        say("stopped")
    finally:
        listening.close()
    return 0


def _store(options: argparse.Namespace, flags: list[str]) -> int:
    """Write what the teacher says of the data until that is done, or a signal asks to stop."""
    from pathlib import Path

    from minillm.config.check import one_of
    from minillm.config.recipe import merged, parse_flags, run_from, split, stage_from
    from minillm.config.schema import ConfigError

    if not (options.out and options.data):
        raise ConfigError("--data and --out go together: what the teacher is asked about, and where its answers go")
    if options.top_k < 0 or not options.temperature > 0:
        raise ConfigError("--top-k must be at least 1 (or left out), and --temperature above 0")
    of_run, of_stage = split(merged({"data": {"train": options.data}}, parse_flags(flags)))
    if misplaced := (of_run.keys() | of_stage.keys()) - {"data"}:
        raise ConfigError(f"teach reads the section data alone, not {min(misplaced)!r}")
    run, stage = run_from(of_run), stage_from(of_stage)
    quiet_libraries()
    from minillm.data.examples import encode, read_records
    from minillm.model.check import check_context, check_ids, check_same_tokenizer
    from minillm.model.head import CausalLM
    from minillm.model.load import load_tokenizer
    from minillm.run.interrupt import Interrupted, exit_on_signal
    from minillm.teacher.store import STATES, plan_of, write_store

    one_of("--states", options.states, ("auto", *STATES))
    try:
        with exit_on_signal():
            tokenizer = load_tokenizer(options.model)
            records = read_records(options.data)
            encoded = encode(records, tokenizer, run.data, stage.data, options.data, answers=True)
            say(str(encoded))
            lm = CausalLM(_loaded(options.model, options.dtype))
            largest = max(max(e.prompt + e.response) for e in encoded.examples)
            check_ids(lm.model, largest, options.data)
            check_context(lm.model, max(len(e.prompt) + len(e.response) for e in encoded.examples))
            student = None
            if options.student:
                check_same_tokenizer(load_tokenizer(options.student), tokenizer)
                student = CausalLM(_loaded(options.student, "float32"))
            plan = plan_of(
                lm,
                tokenizer,
                encoded.examples,
                (options.model, options.data),
                k=options.top_k,
                temperature=options.temperature,
                states=options.states,
            )
            index = write_store(Path(options.out), plan, lm, encoded.examples, options.max_tokens, student)
    except Interrupted:
        say("stopped; the same command goes on")
        return 0
    if options.top_k:
        say(_told(index))
    say(f"{options.out} is a teacher now: model.teacher: {options.out}")
    return 0


def _told(index: dict[str, Any]) -> str:
    """What the top tokens leave out, in words."""
    mass, found = index["tail_mass"], index["measured"]
    lines = [f"outside of the top tokens: {mass['mean']:.2%} of the probability, at most {mass['largest']:.2%}"]
    lines += [
        f"{name}: {found[name]:.4f} nats a token over the vocabulary, {found[f'{name}/top_k']:.4f} over the top "
        f"tokens and the rest ({int(found['tokens'])} tokens measured)"
        for name in ("entropy", "forward_kl", "reverse_kl")
        if name in found
    ]
    return "\n".join(lines)


def _loaded(source: str, dtype: str) -> "PreTrainedModel":
    """A frozen model on the accelerator, where there is one."""
    from accelerate import PartialState

    from minillm.model.check import check_forward
    from minillm.model.load import load_model

    model = load_model(source, dtype).requires_grad_(False).to(PartialState().device)
    check_forward(model)
    return model


def _is_here(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError for an address that cannot be had."""
    from minillm.config.schema import ConfigError

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"nothing can listen on --host {host} --port {port}: {error}") from error
