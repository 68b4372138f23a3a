"""The files of a model's directory: what is refused before they are read, and which one is damaged afterwards."""

import json
from pathlib import Path
from typing import Any

from minillm.config.schema import ConfigError
from minillm.foreign import foreign, reason

LFS = b"version https://git-lfs"
WANTED = "only safetensors files of the model's own directory are read"


def check_weight_names(source: str | Path, config: dict[str, Any]) -> None:
    """Refuse weights that are anything but safetensors files of the model's own directory, as the configuration or an
    index of weights can name them."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

    chosen = config.get("transformers_weights", SAFE_WEIGHTS_INDEX_NAME)
    if not _is_plain(chosen, ".safetensors", ".safetensors.index.json"):
        raise ConfigError(f"the configuration of {str(source)!r} names the weights {chosen!r}; {WANTED}")
    if not chosen.endswith(".json"):
        return
    with foreign(f"the index of the weights of {str(source)!r} cannot be read", ConfigError):
        path = cached_file(source, chosen, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return
    why = _no_object(Path(path))
    tree = {} if why else json.loads(Path(path).read_bytes())
    lacking = next((key for key in ("weight_map", "metadata") if not isinstance(tree.get(key), dict)), "")
    if lacking:
        raise ConfigError(f"{path} {why or f'has no `{lacking}`'}: expected an index of safetensors files")
    for name in tree["weight_map"].values():
        if not _is_plain(name, ".safetensors"):
            raise ConfigError(f"{path} names the file {name!r}; {WANTED}")


def _is_plain(name: Any, *endings: str) -> bool:
    return isinstance(name, str) and not set("/\\\0") & set(name) and name.endswith(endings)


def check_generation_config(source: str | Path) -> None:
    """Refuse one that is damaged: transformers would do without, and the end tokens in it would be lost."""
    from transformers.utils import GENERATION_CONFIG_NAME, cached_file

    with foreign(f"the generation configuration of {str(source)!r} cannot be read", ConfigError):
        path = cached_file(source, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    if path and (why := _damage(Path(path))):
        raise ConfigError(f"{path} {why}, or delete it")


def weights_folder(source: str | Path) -> Path:
    """The directory of a model's files, fetched from the hub where it is none."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), allow_patterns=["*.safetensors", "*.json"]))


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a model's safetensors files; nothing where there are other such files beside
    them."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    index, names = folder / SAFE_WEIGHTS_INDEX_NAME, {SAFE_WEIGHTS_NAME}
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    found: dict[str, tuple[int, ...]] = {}
    if names == {path.name for path in folder.glob("*.safetensors")}:
        for name in names:
            with safe_open(folder / name, "pt") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return found


def damaged(source: str | Path) -> str:
    """Which file of a model is damaged, and how; "" where all of them can be read."""
    from transformers.utils import CONFIG_NAME, cached_file

    folder = Path(source)
    if not folder.is_dir():  # of the hub: what has been fetched
        try:
            found = cached_file(str(source), CONFIG_NAME, local_files_only=True)
        except OSError:
            return ""
        folder = Path(str(found)).parent
    return next((f"{path} {why}" for path in sorted(folder.iterdir()) if (why := _damage(path))), "")


def _damage(path: Path) -> str:
    """What is wrong with one file; "" for nothing, or for a file of no known kind."""
    if path.suffix not in (".json", ".safetensors"):
        return ""
    if not path.is_file():
        return "is no file"
    with path.open("rb") as file:
        head = file.read(len(LFS))
    if head == LFS:
        return "is a pointer of Git LFS, not the file itself: git lfs pull fetches it"
    if not head:
        return "is empty: get it again"
    why = _no_object(path) if path.suffix == ".json" else ""
    if not why and path.name == "tokenizer.json":
        from tokenizers import Tokenizer

        why = _refused(Tokenizer.from_file, str(path))
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        why = _refused(safe_open, path, "pt")
    return f"{why}: get it again" if why else ""


def _no_object(path: Path) -> str:
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({reason(error)})"
    return "" if isinstance(tree, dict) else f"holds a {type(tree).__name__}, not an object"


def _refused(read: Any, *arguments: Any) -> str:
    try:
        with foreign("is damaged", ValueError):
            read(*arguments)
    except ValueError as error:
        return str(error)
    return ""
