"""Writes the tables of README.md from the JSON in benchmarks/results: every number there comes from here.

python benchmarks/tables.py           rewrite the tables
python benchmarks/tables.py --check   exit 1 if README.md is not what the JSON gives
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def rows_of(results: dict, group: str) -> dict[str, dict]:
    """{implementation: {"ms": median, **extra_info}} of one benchmark group."""
    found = {}
    for b in results["benchmarks"]:
        if b["group"] == group:
            found[b["extra_info"]["implementation"]] = {"ms": b["stats"]["median"] * 1e3, **b["extra_info"]}
    return found


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def cpu_table() -> str:
    """Medians and ratios of the CPU benchmarks."""
    results = json.loads((RESULTS / "cpu.json").read_text())
    rows = []
    for operation in ("reverse_kl forward+backward", "token_logprobs+entropy forward", "mixed_sample"):
        groups = sorted(
            {b["group"] for b in results["benchmarks"] if re.match(re.escape(operation) + r" \w+-\d", b["group"])}
        )
        for group in groups:
            found = rows_of(results, group)
            ours = found["minillm"]
            for name in ("minillm", "minillm in place"):
                if name not in found:
                    continue
                row = found[name]
                ratio = [f"{found[peer]['ms'] / row['ms']:.1f}×" for peer in ("eager", "torch.compile")]
                memory = f"{row['peak_extra_MiB']:.0f} MiB ({found['eager']['peak_extra_MiB']:.0f})"
                size = f"{ours['dtype']} {ours['shape'].replace('x', ' × ')}"
                label = operation + (", in place" if name != "minillm" else "")
                rows.append([label, size, f"{row['ms']:.2f} ms", *ratio, f"{row['fraction_of_add']:.2f}", memory])
    header = [
        "operation",
        "logits",
        "time",
        "eager is",
        "torch.compile is",
        "of `torch.add`'s bandwidth",
        "extra memory (eager)",
    ]
    machine = results["machine_info"]
    note = (
        f"{machine['cpu']['brand_raw']}, {machine['instruction_set']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, median of 15; made by `pytest benchmarks/ --benchmark-only "
        "--benchmark-json=benchmarks/results/cpu.json`."
    )
    return markdown(header, rows) + "\n\n" + note


def linear_table() -> str:
    """The losses of hidden states and head weights, each beside eager."""
    results = json.loads((RESULTS / "cpu.json").read_text())
    rows = []
    for group in sorted({b["group"] for b in results["benchmarks"] if b["group"].startswith("linear ")}):
        found = rows_of(results, group)
        for name, row in found.items():
            ratio = row["ms"] / found["eager"]["ms"]
            memory = [f"{row[key]:.0f} MiB" if key in row else "" for key in ("working_MiB", "extra_MiB")]
            size = group.partition("-")[2].replace("x", " × ")
            rows.append([size, name, f"{row['ms'] / 1e3:.2f} s", f"{ratio:.2f}×", *memory])
    header = [
        "rows × hidden × vocabulary",
        "implementation",
        "time",
        "of eager's",
        "working memory",
        "with the gradient",
    ]
    return markdown(header, rows)


def demo_table() -> str:
    """What the demo distillation did to the student: its summary.json."""
    summary = json.loads((RESULTS / "demo.json").read_text())
    stages = list(summary["evaluations"])
    names = {
        "reverse_kl/own_samples": "reverse KL on the student's own samples, nats/token (the objective)",
        "reverse_kl/references": "reverse KL on reference answers, nats/token",
        "rouge_l": "ROUGE-L, greedy",
    }
    rows = []
    for name, title in names.items():
        cells = [f"{summary['evaluations'][s][name]['mean']:.3f}" for s in stages]
        change = summary["changes"][stages[-1]][name]
        cells.append(f"{change['mean']:+.3f} ± {change['standard_error']:.3f} ({change['relative']:+.1%})")
        rows.append([title, *cells])
    environment = summary["environment"]
    minutes = summary["seconds"]["total"] / 60
    note = f"`{summary['command']}`: {minutes:.1f} minutes on {environment['cpu']}, torch {environment['torch']}."
    return markdown(["held-out prompts", *stages, f"change in stage {stages[-1]}"], rows) + "\n\n" + note


def cuda_table() -> str:
    """What the CUDA kernels cost on two generations, from their disassembly."""
    results = json.loads((RESULTS / "gpu-static.json").read_text())["cuda"]
    of = {(x["kernel"], x["architecture"]): x for x in results}
    rows = []
    for kernel in dict.fromkeys(x["kernel"] for x in results):
        a100, h100 = of[kernel, 80], of[kernel, 90]
        bounds = [f"{x['headroom']:.2f} ({x['bound_by']})" for x in (a100, h100)]
        rows.append([kernel, f"{h100['instructions_per_column']:.1f}", str(h100["registers"]), *bounds])
    header = ["kernel", "instructions a column", "registers", "of an A100's bandwidth", "of an H100's bandwidth"]
    note = (
        "Instructions and registers of sm_90. Bandwidth: how much the busiest pipe allows; above 1 memory is the "
        "limit. Counted in the disassembly by `python -m benchmarks.gpu_static.cuda_kernels`, not measured on a card."
    )
    return markdown(header, rows) + "\n\n" + note


def triton_table() -> str:
    """What the compiled Triton kernels cost on bf16 rows, and the bandwidth that their instructions allow."""
    results = json.loads((RESULTS / "gpu-static.json").read_text())
    traffic = {x["kernel"]: x["of_minimum"] for x in results["triton_traffic"]}
    found = {(x["kernel"], x["architecture"]): x for x in results["triton"]}
    rows = []
    for kernel in traffic:
        if not kernel.endswith("bf16"):
            continue
        a100, h100 = found[kernel, 80], found[kernel, 90]
        row = [kernel.removesuffix(" bf16"), f"{traffic[kernel]:.3f}"]
        for x in (a100, h100):
            row += [
                str(x["registers"]),
                f"{x['instructions_per_column']:.1f}",
                f"{x['headroom']:.2f}× ({x['bound_by']})",
            ]
        rows.append(row)
    header = ["kernel", "bytes, of the least"]
    for gpu in ("A100", "H100"):
        header += [f"{gpu}: registers", "instructions a column", "bandwidth they allow"]
    note = (
        f"Counted, not timed: compiled by Triton {results['triton_version']} without a GPU, rows of 151936 bf16 "
        "columns; made by `python -m benchmarks.gpu_static.triton_kernels`."
    )
    return markdown(header, rows) + "\n\n" + note


TABLES = {"demo": demo_table, "cpu": cpu_table, "linear": linear_table, "cuda": cuda_table, "triton": triton_table}


def render(readme: str) -> str:
    for name, table in TABLES.items():
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        if readme.count(begin) != 1 or readme.count(end) != 1:
            raise SystemExit(f"README.md must hold {begin} and {end} once each")
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{table()}\n{end}{rest.split(end)[1]}"
    return readme


def main() -> None:
    path = ROOT / "README.md"
    current = path.read_text()
    wanted = render(current)
    if "--check" in sys.argv:
        sys.exit(
            0 if current == wanted else "README.md differs from benchmarks/results: run python benchmarks/tables.py"
        )
    path.write_text(wanted)


if __name__ == "__main__":
    main()
