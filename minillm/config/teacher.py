"""Teachers that a run does not load: named by the address of a server, or by a directory of what a teacher said."""

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
WITHOUT_TEACHER = ("sft", "kd")
"""Methods that ask a teacher about the answers of the data alone, or about nothing."""


def addresses(source: str) -> list[str]:
    """The servers that `model.teacher` names; none where it names a model."""
    urls = [url.strip().rstrip("/") for url in source.split(",")]
    return urls if source.startswith(("http://", "https://")) else []


def is_stored(source: str) -> bool:
    return bool(source) and (Path(source) / STORE).is_file()


def wrong_teacher(stage: "StageConfig", run: "RunConfig") -> str:
    """What a stage asks of a teacher that is not here, and cannot have; empty where all is well."""
    source, teacher, rollout = run.model.teacher, run.teacher, stage.rollout
    served, stored = addresses(source), is_stored(source)
    if teacher.wire not in WIRES:
        return f"teacher.wire is {teacher.wire!r}; expected one of {', '.join(WIRES)}"
    if teacher.timeout <= 0 or teacher.patience < 0 or teacher.prefetch < 1:
        return "teacher.timeout must be above 0, teacher.patience at least 0 and teacher.prefetch at least 1"
    if stage.loss.support not in ("full", "top_k"):
        return f"loss.support is {stage.loss.support!r}; expected full or top_k"
    if stage.loss.support == "top_k" and not (stored and stage.method == "kd"):
        return (
            "loss.support is top_k, which is for method kd and a model.teacher that is a directory written by "
            "`minillm teach --top-k`: set it to full, which is exact"
        )
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
    for url in served:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            return f"model.teacher names {url!r}; expected http://HOST:PORT, several of them separated by commas"
    if served and stage.method == "minillm" and rollout.alpha > 0 and rollout.coins == "row":
        return (
            f"rollout.alpha is {rollout.alpha:g}: a teacher on a server draws tokens in its turns alone. Set "
            "rollout.coins to a number, such as 4, or rollout.alpha to 0"
        )
    return ""
