"""The section `teacher`, and teachers that a run does not load: named by the address of a server, or by a directory
of what a teacher said."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from minillm.config.schema import RunConfig, StageConfig

STORE = "teacher.json"
"""The file by which a directory is known as one that `minillm teach --out` writes."""
TOKEN = "MINILLM_TEACHER_TOKEN"
"""The environment variable that holds the token of a teacher's server, which no recipe should."""
WIRES = ("auto", "float32", "bfloat16", "float8")
PROVIDERS = ("minillm", "vllm")
WITHOUT_TEACHER = ("sft", "kd")
"""Methods that ask a teacher about the answers of the data alone, or about nothing."""


@dataclass(frozen=True)
class TeacherConfig:
    dtype: str = "checkpoint"
    """Dtype of the frozen teacher: float32, bfloat16, float16, or `checkpoint`, the one in which it is stored."""
    provider: str = "minillm"
    """What serves a teacher behind an address: `minillm` (minillm teach), or `vllm`, a server of vLLM that was started
    as docs/teachers.md says: for kd, gkd, and minillm with rollout.alpha 0."""
    files: str = ""
    """vllm: directory or hub id of the model that is served, of which the head, the configuration and the tokenizer
    are read here; empty: what the server says that it has loaded."""
    wire: str = "auto"
    """In what the hidden states of a teacher on a server travel: `auto`, its own dtype, which changes nothing;
    float32; bfloat16; or float8, scaled for each token, which rounds to 4 bits."""
    compress: bool = False
    """Let a teacher's server compress the signs and exponents that it sends: a quarter less of bfloat16, for work on
    both sides that pays below a gigabit a second."""
    timeout: float = 120.0
    """Seconds that a teacher's server may take for an answer, before it is asked again, or another one."""
    patience: float = 300.0
    """Seconds for which servers that do not answer are asked again, before the run saves and ends."""
    prefetch: int = 4
    """Micro-batches that a teacher on a server, or a stored one, is asked about before the first is needed."""
    quantize: str = ""
    """`8bit` (int8, by torchao) or `4bit` (NF4, by bitsandbytes) rounds the teacher's matrices, all but its head and
    embeddings: less memory, a slightly other teacher."""
    source: str = "checkpoint"
    """`checkpoint`: the model that model.teacher names. The others are the student's own weights, of which what is
    frozen is held once, and leave model.teacher empty: `base`, those below its LoRA adapters; `student`, as they are
    at each step; `ema`, their moving average. The last two are for kd and gkd."""
    decay: float = 0.99
    """ema: average ← decay · average + (1 - decay) · student, after each optimiser step; it starts at the student."""


def addresses(source: str) -> list[str]:
    """The servers that `model.teacher` names; none where it names a model."""
    urls = [url.strip().rstrip("/") for url in source.split(",")]
    return urls if source.startswith(("http://", "https://")) else []


def is_stored(source: str) -> bool:
    return bool(source) and (Path(source) / STORE).is_file()


def wrong_address(source: str) -> str:
    """The first of the servers that is no address, and what was expected; empty where all are."""
    for url in addresses(source):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            return f"{url!r}; expected http://HOST:PORT, several of them separated by commas"
    return ""


def wrong_settings(teacher: TeacherConfig) -> str:
    """What of how servers are asked cannot be; empty where all is well."""
    if teacher.wire not in WIRES:
        return f"teacher.wire is {teacher.wire!r}; expected one of {', '.join(WIRES)}"
    if teacher.provider not in PROVIDERS:
        return f"teacher.provider is {teacher.provider!r}; expected one of {', '.join(PROVIDERS)}"
    if teacher.timeout <= 0 or teacher.patience < 0 or teacher.prefetch < 1:
        return "teacher.timeout must be above 0, teacher.patience at least 0 and teacher.prefetch at least 1"
    if teacher.provider == "vllm" and (teacher.wire == "float8" or teacher.compress):
        return "teacher.provider is vllm, which sends neither scaled float8 nor compressed states: leave them out"
    return ""


def wrong_teacher(stage: "StageConfig", run: "RunConfig") -> str:
    """What a stage asks of a teacher that is not here, and cannot have; empty where all is well."""
    source, teacher, rollout = run.model.teacher, run.teacher, stage.rollout
    served, stored = addresses(source), is_stored(source)
    if stage.loss.support not in ("full", "top_k"):
        return f"loss.support is {stage.loss.support!r}; expected full or top_k"
    if stage.loss.support == "top_k" and not (stored and stage.method == "kd"):
        return (
            "loss.support is top_k, which is for method kd and a model.teacher that is a directory written by "
            "`minillm teach --top-k`: set it to full, which is exact"
        )
    if (teacher.provider == "vllm" or teacher.files) and (why := _wrong_for_vllm(stage, teacher, bool(served))):
        return why
    if not (served or stored):
        return ""
    what = "on a server" if served else "stored"
    if run.model.drop_layers is not None:
        return f"model.drop_layers cuts the student from its teacher, which is {what}: name a model.student"
    if teacher.dtype != "checkpoint":
        return f"teacher.dtype is {teacher.dtype}, but the teacher is {what}: give --dtype to `minillm teach`"
    if stored and stage.method not in WITHOUT_TEACHER:
        return (
            f"method {stage.method} asks the teacher about answers that do not exist yet, and {source} holds what it "
            "said of given ones: use method kd, or a teacher on a server"
        )
    if wrong := wrong_address(source):
        return f"model.teacher names {wrong}"
    if served and stage.method == "minillm" and rollout.alpha > 0 and rollout.coins == "row":
        return (
            f"rollout.alpha is {rollout.alpha:g}: a teacher on a server draws tokens in its turns alone. Set "
            "rollout.coins to a number, such as 4, or rollout.alpha to 0"
        )
    return ""


def _wrong_for_vllm(stage: "StageConfig", teacher: TeacherConfig, served: bool) -> str:
    if not served or teacher.provider != "vllm":
        return "teacher.provider vllm and teacher.files are for a model.teacher that is the address of a vLLM server"
    if stage.method == "seqkd" or (stage.method == "minillm" and stage.rollout.alpha > 0):
        why = "method seqkd learns from its answers" if stage.method == "seqkd" else "rollout.alpha is above 0"
        return (
            f"teacher.provider is vllm, which gives a teacher's hidden states and draws nothing, and {why}: serve the "
            "teacher by `minillm teach`, which draws too"
        )
    return ""
