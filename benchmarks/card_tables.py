"""The tables of what was measured on a card, by `python -m benchmarks.gpu`."""

from __future__ import annotations

import json
from typing import Any

from cells import RESULTS, markdown

MEASURED = RESULTS / "gpu" / "nvidia-h100-80gb-hbm3.jsonl"
COMMAND = "`python -m benchmarks.gpu`"
BY = {"cuda": "CUDA", "triton": "Triton", "eager": "eager", "torch.compile": "torch.compile", "liger": "Liger"}
ROWS = {
    "rkl f+b": "reverse KL, forward and backward",
    "rkl f+b in place": "the same, the gradient over the logits",
    "rkl forward": "reverse KL, forward",
    "jsd f+b": "JSD, forward and backward",
    "token_logprobs+entropy": "log-probability and entropy of tokens",
    "mixed_sample": "a token from the mixture",
}
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}


def records(section: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in MEASURED.read_text().splitlines())
    return [x for x in lines if x["section"] == section]


def card() -> str:
    """Card, driver and versions."""
    found = {x["name"]: x for x in records("env")}
    versions, driver = found["versions"], found["gpu"]["smi"].split(", ")[1]
    names = {"torch": "torch", "triton": "Triton", "liger_kernel": "Liger"}
    return f"{found['gpu']['device']}, driver {driver}, " + ", ".join(f"{n} {versions[k]}" for k, n in names.items())


def ceiling(name: str) -> dict[str, Any]:
    return next(x for x in records("ceilings") if x["name"] == name)


def headline_card_table() -> str:
    """One line for each thing that a user would ask about first."""
    lines = []
    for name in ("rkl f+b", "mixed_sample"):
        cells = {x["by"]: x for x in records("rows") if x.get("name") == name and x.get("shape") == [8192, 128256]
                 and x["dtype"] == "bfloat16"}  # fmt: skip
        others = [f"{BY[by]}: {cells[by]['ms']:.1f}" for by in ("eager", "torch.compile", "liger") if by in cells]
        title = f"{ROWS[name]}, 8192 rows of 128256 tokens, bf16: time, ms"
        lines.append([title, f"{cells['cuda']['ms']:.1f}", ", ".join(others)])
    found = {x["by"]: x for x in records("linear") if x.get("shape") == [8192, 4096, 128256]}
    peers = {"eager": "eager", "torch.compile, chunks of 1024": "torch.compile", "liger fused linear jsd": "Liger"}
    size = "8192 rows of width 4096, 128256 tokens, bf16"
    cell = lambda by: f"{found[by]['ms']:.1f}; {found[by]['extra_mib'] / 1024:.1f}"
    title = f"reverse KL of hidden states, {size}, forward and backward: time, ms; working memory, GiB"
    lines.append([title, cell("minillm cuda"), ", ".join(f"{title}: {cell(by)}" for by, title in peers.items())])
    return markdown([f"measured on {card()}", "minillm", "for comparison"], lines)


def card_rows_table() -> str:
    """Milliseconds of the row operations, and how much of a copy's bandwidth that is."""
    copy = ceiling("copy")["gbps"]
    found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for x in records("rows"):
        if "ms" in x:
            shape = " × ".join(map(str, x["shape"]))
            found.setdefault((ROWS[x["name"]], shape, DTYPES[x["dtype"]]), {})[x["by"]] = x
    lines = []
    for (operation, shape, dtype), cells in found.items():
        times = [f"{cells[by]['ms']:.2f}" if by in cells else "" for by in BY]
        lines.append([operation, f"{dtype} {shape}", *times, f"{cells['cuda']['gbps'] / copy:.2f}"])
    note = (
        f"{card()}; {COMMAND}, medians, the L2 cache flushed before each. Share: the bytes that two launches of the "
        f"operation move in the time of the CUDA backend, over the bandwidth of a copy, {copy:.0f} GB/s."
    )
    header = ["operation", "rows × vocabulary", *(f"{name}, ms" for name in BY.values()), "CUDA's share"]
    return markdown(header, lines) + "\n\n" + note


def card_linear_table() -> str:
    """The reverse KL of hidden states and heads beside the four matmuls that nothing can leave out."""
    peak = ceiling("gemm")["tflops"]
    lines = []
    for x in records("linear"):
        if "ms" in x:
            N, H, V = x["shape"]
            width = H if x.get("teacher_width", H) == H else f"({H} | {x['teacher_width']})"
            by = x["by"].replace("minillm ", "minillm, ")
            rate = [f"{x['tflops']:.0f}", f"{x['tflops'] / peak:.0%}"]
            lines.append([f"{N} × {width} × {V}", by, f"{x['ms']:.1f}", *rate, f"{x['extra_mib'] / 1024:.1f}"])
    note = (
        f"bf16, forward and backward; FLOP of four matmuls over the time, and that over one of 8192 × 8192 × 8192 "
        f"({peak:.0f} TFLOP/s). {card()}; {COMMAND}."
    )
    header = ["rows × width × vocabulary", "by", "ms", "TFLOP/s", "of a matmul", "working memory, GiB"]
    return markdown(header, lines) + "\n\n" + note


def card_rollouts_table() -> str:
    """Tokens a second of rollouts."""
    found: dict[str, dict[int, float]] = {}
    for x in records("trainer"):
        if x["name"] == "rollout":
            found.setdefault(x["by"], {})[x["sequences"]] = x["tokens_per_second"]
    names = {
        "both": "student and teacher, CUDA graphs",
        "both, no graphs": "student and teacher, launched one by one",
        "student": "student alone, CUDA graphs",
        "student, no graphs": "student alone, launched one by one",
        "generate": "student alone, `transformers.generate`",
        "vllm": "student alone, vLLM",
    }
    counts = sorted({n for by in found.values() for n in by})
    lines = [[title, *(f"{found[by][n]:.0f}" for n in counts)] for by, title in names.items() if by in found]
    header = ["new tokens a second", *(f"{n} sequences" for n in counts)]
    note = f"Random weights of the demo's sizes in bf16, 64 new tokens each, nothing ends. {card()}; {COMMAND}."
    return markdown(header, lines) + "\n\n" + note


def card_checks() -> str:
    """How many checks and tests the card passed."""
    checks = [x for x in records("correct") if "ok" in x]
    tests = next((x for x in records("pytest") if "tests" in x), None)
    text = f"{sum(x['ok'] for x in checks)} of {len(checks)} checks against float64 passed"
    if tests:
        failed = tests["failures"] + tests["errors"]
        text += f", and {tests['tests'] - failed - tests['skipped']} of {tests['tests'] - tests['skipped']} tests"
    return text + f". {card()}; {COMMAND}."
