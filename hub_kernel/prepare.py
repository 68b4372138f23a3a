"""Lay minillm_kernels out as a kernel of the Hugging Face hub, for kernel-builder.

    python hub_kernel/prepare.py OUT        then, in OUT: kernel-builder build

OUT gets build.toml, flake.nix, CARD.md and torch-ext/minillm_kernels. A kernel of the hub is loaded from any path,
several versions in one process, beside an installed package; so its torch operators may not stand in a namespace of a
fixed name. kernel-builder gives each build one of its own, in a module `_ops` that it generates; here every mention of
the namespace is made one of that module. The compiled core stays behind: torch and Triton are all that it needs.
"""

import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "minillm_kernels"
NAMESPACE = "_ops.ops"


def prepare(out: Path) -> Path:
    """Write the layout to the new directory `out`; returns its torch-ext/minillm_kernels.

    Raises FileExistsError where `out` exists, ValueError where a source names the namespace in a way not known here.
    """
    out.mkdir(parents=True)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(HERE / name, out)
    shutil.copy(HERE.parent / "LICENSE", out)
    target = out / "torch-ext" / PACKAGE.name
    for path in sorted(PACKAGE.rglob("*.py")):
        place = target / path.relative_to(PACKAGE)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(in_its_own_namespace(path.read_text(encoding="utf-8"), path), encoding="utf-8")
    return target


def in_its_own_namespace(source: str, path: Path) -> str:
    """The source of a module with its operators in the namespace of `_ops`."""
    code = re.sub(r'^("""|r""").*?"""\n', "", source, count=1, flags=re.S)
    head = source[: len(source) - len(code)]
    code = code.replace('Library("minillm", ', f"Library({NAMESPACE}.name, ")
    code = re.sub(r'f"minillm::\{(\w+)\}"', rf'f"{{{NAMESPACE}.name}}::{{\1}}"', code)
    code = code.replace("torch.ops.minillm", NAMESPACE)
    left = re.findall(r".*[\"']minillm[\"':].*", code)
    if left:
        raise ValueError(
            f"{path}: prepare.py does not know this way to name the operators' namespace: {left[0].strip()}"
        )
    if NAMESPACE not in code:
        return source
    up = "." * len(path.relative_to(PACKAGE).parts)
    return head + re.sub(r"^(import torch)$", rf"\1\n\nfrom {up} import _ops", code, count=1, flags=re.M)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python hub_kernel/prepare.py OUT")
    print(prepare(Path(sys.argv[1])))
