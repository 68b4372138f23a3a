"""Chat templates: programs that come with a model and run on its user's machine.

transformers confines what they can reach (jinja's sandbox), not what they take: a few characters of template loop for
ever, or fill the memory in one operation that no exception can end. So they run in a process of their own, which the
kernel keeps within limits. It reads one JSON object a line, answers with one, and ends with its input.
"""

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from typing import Any

from minillm.foreign import reason

SECONDS, MEMORY = 2, 1 << 30
"""What one rendering may take: processor time, and bytes of memory (where RLIMIT_DATA counts all, as on Linux)."""
TEMPLATE, TEXT = 1 << 20, 1 << 24
"""Characters of the longest template, and of the longest text that one may write."""

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What begins the assistant's text in a template that marks it."""
ENDED = f"it took longer than {SECONDS} seconds and was ended, or its process was lost"
CHILD = "import sys; sys.path[:] = {path!r}; from minillm.data.templates import serve; serve()"


class TemplateError(ValueError):
    """A template that cannot be rendered, in the words of jinja or of these limits."""


@lru_cache(maxsize=16)  # a record is rendered for its prompt, for its turns and to see what opens the answer
def _render(template: str, request: str) -> tuple[str, list[tuple[int, int]]]:
    answer = _process.ask(request)
    if not answer:
        _process.ended.add(template)
        raise TemplateError(ENDED)
    text, spans, refused = json.loads(answer)
    if refused:
        raise TemplateError(refused)
    return text, [(start, end) for start, end in spans]


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """The text of a conversation in a template of transformers' dialect of jinja.

    Args:
        template: the program.
        messages: the conversation, `role` and `content` of each message and what else the template reads.
        **variables: what else it may read, such as `tools` (definitions or None), `add_generation_prompt` (whether to
            open the model's turn) and the names of special tokens. They reach it as JSON has them.

    Returns:
        The text.

    Raises:
        TemplateError: the template refuses the conversation or is none, or takes more than SECONDS, MEMORY,
            TEMPLATE or TEXT.

    Example:
        >>> from minillm.data.templates import render
        >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        >>> render(template, [{"role": "user", "content": "a"}])
        '<user>a'
    """
    return _request(template, messages, variables)[0]


def marked(template: str, messages: list[dict[str, Any]], **variables: Any) -> list[tuple[int, int]]:
    """The spans [start, end) of the text's characters that the template marks as the assistant's ({% generation %});
    arguments and errors are those of `render`."""
    return _request(template, messages, variables)[1]


def _request(
    template: str, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    if len(template) > TEMPLATE:
        raise TemplateError(f"it has {len(template)} characters, of which at most {TEMPLATE} are read")
    if template in _process.ended:
        raise TemplateError(ENDED)
    request = {**variables, "conversations": [messages], "chat_template": template}
    return _render(template, json.dumps(request, default=str))


class _Process:
    """The one process of this one, started when it is first asked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.child: subprocess.Popen[str] | None = None
        self.owner = 0
        self.ended: set[str] = set()
        """Templates that took too long, which are not tried again."""

    def ask(self, request: str) -> str:
        """Its answer; empty where it was ended."""
        with self.lock:
            if self.child is None or self.owner != os.getpid():  # the pipes of a forked process are its parent's
                self.child, self.owner = _start(), os.getpid()
            assert self.child.stdin and self.child.stdout
            self.child.stdin.write(request + "\n")
            self.child.stdin.flush()
            answer = self.child.stdout.readline()
            if not answer:
                self.child.communicate()
                self.child = None
        return answer


_process = _Process()


def _start() -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(path=sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="ascii",
        start_new_session=True,  # a Ctrl-C that asks the run to stop is not for it
    )
    atexit.register(child.communicate)
    return child


def serve() -> None:
    """Answer requests until the input ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever is printed is no answer
    limited = sys.platform != "win32"
    if limited:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the kernel ends the process, even inside of one operation
    for line in sys.stdin:
        if limited:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answers.write(json.dumps(_answer(render_jinja_template, line)) + "\n")
        answers.flush()
        if limited:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(render_jinja_template: Any, line: str) -> tuple[str, list[tuple[int, int]], str]:
    """The text, the spans that it marks, and why there is none."""
    request = json.loads(line)
    try:
        marks = bool(MARKED.search(request["chat_template"]))
        (text,), spans = render_jinja_template(**request, return_assistant_tokens_mask=marks)
    except Exception as error:  # a template fails as it likes
        return "", [], reason(error)
    if len(text) > TEXT:
        return "", [], f"it writes {len(text)} characters, of which at most {TEXT} are read"
    return text, spans[0] if spans else [], ""
