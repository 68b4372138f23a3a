"""`minillm teach`: a teacher for others, as a server or as what it says of given data. It imports nothing heavy."""

import argparse
import os
import socket
from ipaddress import ip_address

from minillm.config.teacher import TOKEN
from minillm.terminal import quiet_libraries, say

EXTRA = 'pip install "minillm-kernels[teach]"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="hub id, directory or package:NAME")
    parser.add_argument("--dtype", default="checkpoint", help="float32, bfloat16, float16, or as stored (default)")
    server = parser.add_argument_group("a server (without --out)")
    server.add_argument("--host", default="127.0.0.1", help=f"other than this machine alone needs ${TOKEN}")
    server.add_argument("--port", type=int, default=8080, help="0: a free one (default 8080)")
    server.add_argument("--max-tokens", type=int, default=16384, help="of a forward pass (default 16384)")
    server.add_argument("--request-tokens", type=int, default=65536, help="of one question (default 65536)")
    server.add_argument("--queue", type=int, default=64, help="questions that may wait (default 64)")


def teach(options: argparse.Namespace, flags: list[str]) -> int:
    from minillm.config.check import DTYPES, one_of
    from minillm.config.schema import ConfigError

    one_of("--dtype", options.dtype, ("checkpoint", *DTYPES))
    for name in ("max_tokens", "request_tokens", "queue"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
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
    from accelerate import PartialState

    from minillm.model.check import check_forward
    from minillm.model.head import CausalLM
    from minillm.model.load import load_model, load_tokenizer
    from minillm.run.interrupt import Interrupted, exit_on_signal
    from minillm.teacher.server import TeacherServer

    try:
        with exit_on_signal():
            model = load_model(options.model, options.dtype).requires_grad_(False).to(PartialState().device)
            check_forward(model)
            tokens = (options.max_tokens, options.request_tokens)
            server = TeacherServer(
                CausalLM(model), load_tokenizer(options.model), options.model, token, *tokens, options.queue
            )
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
