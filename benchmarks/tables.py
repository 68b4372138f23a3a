"""Writes the tables of README.md and docs/*.md from the JSON in benchmarks/results: every number in them is from it.

A table stands between `<!-- table: NAME -->` and `<!-- end: NAME -->`.

python benchmarks/tables.py           rewrite the tables
python benchmarks/tables.py --check   exit 1 if a page is not what the JSON gives
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from card_tables import (
    card_checks,
    card_linear_table,
    card_rollouts_table,
    card_rows_table,
    headline_card_table,
)
from cells import RESULTS, load, machine, markdown, rows_of, shape_of
from rollout_tables import coins_table, engine_table, operators_table, rollouts_table, training_table

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


# ---- what a reader sees first


def headline_table() -> str:
    """One line for each thing that a user would ask about first."""
    demo, trl, cpu = load("demo.json"), load("trl.json"), load("cpu.json")
    stages = student_evaluations(demo)
    kl = [demo["evaluations"][stage]["reverse_kl"]["own_samples"]["mean"] for stage in stages]
    ours, theirs = trl["rows"]["minillm"], trl["rows"]["trl"]
    step = f"one on-policy step, {trl['prompts']} prompts × {trl['new_tokens']} tokens"
    version = f"TRL {theirs['versions']['trl']}"
    rows = [
        [
            f"demo: reverse KL on the student's own samples, nats per token, after {stages[-1]}",
            f"{kl[-1]:.3f}",
            ", ".join(f"{stage}: {value:.3f}" for stage, value in zip(stages[:-1], kl, strict=False)),
        ],
        [f"{step}: time, s", f"{ours['seconds']:.2f}", f"{version}: {theirs['seconds']:.2f}"],
        [f"{step}: working memory, MiB", f"{ours['extra_MiB']:.0f}", f"{version}: {theirs['extra_MiB']:.0f}"],
    ]
    found = rows_of(cpu, "reverse_kl forward+backward bf16-192x151936")
    peers = ", ".join(f"{peer}: {found[peer]['ms']:.2f}" for peer in ("eager", "torch.compile"))
    title = "reverse KL of logits, in place, 192 rows of 151936 tokens, bfloat16: time, ms"
    rows.append([title, f"{found['minillm in place']['ms']:.2f}", peers])
    return markdown([f"measured on a CPU, {machine(cpu)}", "minillm", "for comparison"], rows)


def demo_table() -> str:
    """What the demo distillation did to the student: its summary.json."""
    summary = load("demo.json")
    stages = student_evaluations(summary)
    names = {
        "reverse_kl/own_samples": "reverse KL on the student's own samples, nats/token (the objective)",
        "reverse_kl/references": "reverse KL on reference answers, nats/token",
        "rouge_l/greedy": "ROUGE-L of greedy answers, 0-100",
    }
    rows = []
    for name, title in names.items():
        metric, along = name.split("/")
        cells = [f"{summary['evaluations'][s][metric][along]['mean']:.3f}" for s in stages]
        change = summary["changes"][stages[-1]][name]
        cells.append(f"{change['mean']:+.3f} ± {change['standard_error']:.3f} ({change['relative']:+.1%})")
        rows.append([title, *cells])
    environment = summary["environment"]
    minutes = summary["seconds"]["total"] / 60
    note = f"`{summary['command']}`: {minutes:.1f} minutes on {environment['cpu']}, torch {environment['torch']}."
    prompts = summary["evaluations"][stages[0]]["prompts"]
    return markdown([f"{prompts} held-out prompts", *stages, f"change in {stages[-1]}"], rows) + "\n\n" + note


def student_evaluations(summary: dict[str, Any]) -> list[str]:
    """The start and the stages; the teacher was evaluated too."""
    return [name for name in summary["evaluations"] if name != "teacher"]


def recipes_table() -> str:
    """Every recipe, and what was measured of those that have a summary in benchmarks/results."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    measured = {summary["recipe"]: summary for summary in found if "recipe" in summary}
    rows = []
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        text = path.read_text()
        recipe = yaml.safe_load(text)
        about = text.splitlines()[0].removeprefix("#").strip()
        stages = recipe.get("stages") or {"": recipe}
        methods = ", ".join(stage.get("method", "minillm") for stage in stages.values())
        summary = measured.get(path.stem)
        unknown = "not measured"
        card, hours = unknown, unknown
        if summary:
            environment = summary["environment"]
            accelerator, threads = environment["accelerator"], environment["threads"]
            card = f"{environment['cpu']}, {threads} threads" if accelerator == "none" else accelerator
            hours = f"{summary['seconds']['total'] / 3600:.2f}"
        rows.append([f"`recipes/{path.name}`", about, methods, card, hours, unknown])
    return markdown(["recipe", "what it does", "methods", "card", "time, hours", "memory, GiB"], rows)


# ---- kernels


def cpu_table() -> str:
    """Medians and ratios of the CPU benchmarks."""
    results = load("cpu.json")
    rows = []
    for operation in ("reverse_kl forward+backward", "token_logprobs+entropy forward", "mixed_sample"):
        groups = sorted(
            {b["group"] for b in results["benchmarks"] if re.match(re.escape(operation) + r" \w+-\d", b["group"])}
        )
        for group in groups:
            found = rows_of(results, group)
            for name in ("minillm", "minillm in place"):
                if (row := found.get(name)) is None:
                    continue
                ratio = [f"{found[peer]['ms'] / row['ms']:.1f}×" for peer in ("eager", "torch.compile")]
                memory = [f"{row['peak_extra_MiB']:.0f}", f"{found['eager']['peak_extra_MiB']:.0f}"]
                label = operation.replace("_", " ") + (", in place" if name != "minillm" else "")
                share = f"{row['fraction_of_add']:.2f}"
                rows.append([label, shape_of(row), str(row["threads"]), f"{row['ms']:.2f}", *ratio, share, *memory])
    header = [
        "operation",
        "logits, rows × vocabulary",
        "threads",
        "time, ms",
        "eager / ours",
        "torch.compile / ours",
        "share of `torch.add`'s bandwidth",
        "extra memory, MiB",
        "extra memory of eager, MiB",
    ]
    note = (
        f"{machine(results)}, {results['machine_info']['instruction_set']}, median of 15; made by `pytest benchmarks/ "
        "--benchmark-only --ignore=benchmarks/test_rollouts.py --benchmark-json=benchmarks/results/cpu.json`."
    )
    return markdown(header, rows) + "\n\n" + note


def kernels_table() -> str:
    """Each CPU kernel alone, and what bounds it."""
    results = load("cpu.json")
    groups = dict.fromkeys(b["group"] for b in results["benchmarks"] if b["group"].startswith("kernels "))
    kernels = [item for group in groups for item in rows_of(results, group).items() if "bound_by" in item[1]]
    for group in dict.fromkeys(b["group"] for b in results["benchmarks"]):
        if re.match(r"mixed_sample \w+-\d", group):
            kernels.append(("row_sample", rows_of(results, group)["minillm"]))
    rows = []
    for name, row in kernels:
        times = [f"{row[part]:.2f}" for part in ("ms", "call_ms", "arithmetic_ms", "memory_ms")]
        bound = {"call": "launch overhead"}.get(row["bound_by"], row["bound_by"])
        rows.append([name, shape_of(row), *times, bound, f"{row['of_bound']:.2f}"])
    header = [
        "kernel",
        "logits, rows × vocabulary",
        "time, ms",
        "launch overhead, ms",
        "arithmetic, ms",
        "memory traffic, ms",
        "bound by",
        "bound / time",
    ]
    return markdown(header, rows)


def linear_table() -> str:
    """The losses of hidden states and head weights, each beside eager."""
    results = load("cpu.json")
    rows = []
    for group in dict.fromkeys(b["group"] for b in results["benchmarks"] if b["group"].startswith("linear ")):
        found = rows_of(results, group)
        loss = group.split()[1].replace("_", " ")
        for name, row in found.items():
            ratio = row["ms"] / found["eager"]["ms"]
            memory = [f"{row[key]:.0f}" if key in row else "" for key in ("working_MiB", "extra_MiB")]
            size = group.partition("-")[2].replace("x", " × ")
            rows.append([loss, size, name, f"{row['ms'] / 1e3:.2f}", f"{ratio:.2f}", *memory])
    heads = {rows: rows_of(results, f"head {rows}x576x49152") for rows in (8, 256)}
    times = " and ".join(
        f"{found['torch.mm']['ms'] / found['minillm']['ms']:.1f}× as fast as torch.mm for {rows} rows"
        for rows, found in heads.items()
    )
    header = [
        "loss",
        "rows × hidden × vocabulary",
        "implementation",
        "time, s",
        "time / eager's",
        "working memory, MiB",
        "with the gradient, MiB",
    ]
    return markdown(header, rows) + f"\n\nThe product with a head of 49152 × 576 alone is {times}."


def gpu_table() -> str:
    """What the compiled kernels of both GPU backends cost on bf16 rows, and the bandwidth that they allow."""
    results = load("gpu-static.json")
    build = results["cuda_build"]
    rows = []
    for kernel in (x["kernel"] for x in results["cuda_traffic"] if x["kernel"].endswith("bf16")):
        row = [kernel.removesuffix(" bf16")]
        for backend in ("cuda", "triton"):
            moved = {x["kernel"]: x["of_minimum"] for x in results[f"{backend}_traffic"]}
            found = {x["architecture"]: x for x in results[backend] if x["kernel"] == kernel}
            if not found:
                row += ["–"] * 5
                continue
            row += [f"{moved[kernel]:.3f}", str(found[90]["registers"]), f"{found[90]['instructions_per_column']:.1f}"]
            row += [f"{x['headroom']:.2f}× ({x['bound_by']})" if (x := found.get(a)) else "–" for a in (80, 90)]
            if backend == "cuda":
                row.append(f"{(x := found[90]['not_aligned'])['headroom']:.2f}× ({x['bound_by']})")
        rows.append(row)
    columns = ["bytes / least bytes", "registers", "instructions per column", "A100", "H100"]
    both = [f"{backend}: {c}" for backend in ("CUDA", "Triton") for c in columns]
    header = ["kernel", *both[:5], "CUDA: H100, not aligned", *both[5:]]
    note = (
        "bf16 rows of 151936 columns (row_stats_grad: 28656, cluster 57312), registers and instructions of sm_90. "
        "A100, H100: the bandwidth that the busiest pipe allows, divided by the card's; above 1× memory is the limit. "
        "Counted, not timed: `python -m benchmarks.gpu_static.cuda_kernels` and "
        f"`python -m benchmarks.gpu_static.triton_kernels` (Triton {results['triton_version']}). All of `csrc/cuda` "
        f"for {build['timed']} takes {build['processor_seconds']:.0f} s of a processor to compile (nvcc "
        f"{build['nvcc_version']})."
    )
    return markdown(header, rows) + "\n\n" + note


# ---- training


def trl_table() -> str:
    """A step of our trainer beside one of TRL's."""
    results = load("trl.json")
    rows = [
        [f"{name} {row['versions'].get(name, '')}".strip(), f"{row['seconds']:.2f}", f"{row['extra_MiB']:.0f}"]
        for name, row in results["rows"].items()
    ]
    note = (
        f"{results['times_faster']:.2f}× faster with {results['share_of_memory']:.2f}× of the memory; "
        f"{results['threads']} threads, median of {results['steps'] * results['processes']} steps; made by "
        f"`{results['command']}`, which says how it is made fair."
    )
    header = [f"a step of {results['prompts']} prompts × {results['new_tokens']} tokens", "time, s", "memory, MiB"]
    return markdown(header, rows) + "\n\n" + note


def mesh_table() -> str:
    """What `minillm estimate --gpus` computes; nothing of it was measured."""
    lines = []
    for row in load("mesh.json")["rows"]:
        placement = row.get("placement")
        where = f"{placement['student']}, {placement['teacher']}" if placement else "nothing fits"
        numbers = [f"{row[key]:.{digits}f}" if placement else "" for key, digits in
                   (("gigabytes", 0), ("seconds", 2), ("decoding", 2))]  # fmt: skip
        lines.append([f"{row['teacher']} → {row['student']}", row["stage"], row["mesh"], where, *numbers])
    return markdown(["pair", "method", "GPUs", "student, teacher", "GB a GPU", "s a step", "of it decoding"], lines)


TABLES = {
    "mesh": mesh_table,
    "headline": headline_table,
    "headline_card": headline_card_table,
    "demo": demo_table,
    "recipes": recipes_table,
    "cpu": cpu_table,
    "kernels": kernels_table,
    "linear": linear_table,
    "gpu": gpu_table,
    "card_checks": card_checks,
    "card_rows": card_rows_table,
    "card_linear": card_linear_table,
    "card_rollouts": card_rollouts_table,
    "training": training_table,
    "rollouts": rollouts_table,
    "operators": operators_table,
    "engine": engine_table,
    "coins": coins_table,
    "trl": trl_table,
}


def render(page: str) -> str:
    """The page with every table that it has a place for."""
    for name in re.findall(r"<!-- table: (\w+) -->", page):
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{TABLES[name]()}\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    current = {path: path.read_text() for path in PAGES}
    wanted = {path: render(page) for path, page in current.items()}
    missing = [name for name in TABLES if not any(f"<!-- table: {name} -->" in page for page in wanted.values())]
    if missing:
        sys.exit(f"no page has a place for the tables {', '.join(missing)}")
    stale = [str(path.relative_to(ROOT)) for path in PAGES if current[path] != wanted[path]]
    if "--check" in sys.argv:
        sys.exit(
            f"not what the committed JSON gives: {', '.join(stale)}; run python benchmarks/tables.py" if stale else 0
        )
    for path in PAGES:
        path.write_text(wanted[path])


if __name__ == "__main__":
    main()
