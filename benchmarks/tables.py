"""Writes the tables of README.md from the JSON in benchmarks/results and docs/study: every number there is from it.

python benchmarks/tables.py           rewrite the tables
python benchmarks/tables.py --check   exit 1 if README.md is not what the JSON gives
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

from minillm.study import document
from minillm.study.plan import load_study

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


def kernels_table() -> str:
    """Each CPU kernel alone, and what bounds it."""
    results = json.loads((RESULTS / "cpu.json").read_text())
    groups = dict.fromkeys(b["group"] for b in results["benchmarks"] if b["group"].startswith("kernels "))
    kernels = [item for group in groups for item in rows_of(results, group).items() if "bound_by" in item[1]]
    for group in dict.fromkeys(b["group"] for b in results["benchmarks"]):
        if re.match(r"mixed_sample \w+-\d", group):
            kernels.append(("row_sample", rows_of(results, group)["minillm"]))
    rows = []
    for name, row in kernels:
        size = f"{row['dtype']} {row['shape'].replace('x', ' × ')}"
        times = [f"{row[part]:.2f} ms" for part in ("ms", "call_ms", "arithmetic_ms", "memory_ms")]
        rows.append([name, size, *times, row["bound_by"], f"{row['of_bound']:.2f}"])
    header = ["kernel", "logits", "time", "the call", "arithmetic", "memory", "bound by", "of the bound"]
    return markdown(header, rows)


def linear_table() -> str:
    """The losses of hidden states and head weights, each beside eager."""
    results = json.loads((RESULTS / "cpu.json").read_text())
    rows = []
    for group in dict.fromkeys(b["group"] for b in results["benchmarks"] if b["group"].startswith("linear ")):
        found = rows_of(results, group)
        loss = group.split()[1].replace("_", " ")
        for name, row in found.items():
            ratio = row["ms"] / found["eager"]["ms"]
            memory = [f"{row[key]:.0f} MiB" if key in row else "" for key in ("working_MiB", "extra_MiB")]
            size = group.partition("-")[2].replace("x", " × ")
            rows.append([loss, size, name, f"{row['ms'] / 1e3:.2f} s", f"{ratio:.2f}×", *memory])
    heads = {rows: rows_of(results, f"head {rows}x576x49152") for rows in (8, 256)}
    times = " and ".join(
        f"{found['torch.mm']['ms'] / found['minillm']['ms']:.1f}× as fast as torch.mm for {rows} rows"
        for rows, found in heads.items()
    )
    header = [
        "loss",
        "rows × hidden × vocabulary",
        "implementation",
        "time",
        "of eager's",
        "working memory",
        "with the gradient",
    ]
    return markdown(header, rows) + f"\n\nThe product with a head of 49152 × 576 alone is {times}."


def demo_table() -> str:
    """What the demo distillation did to the student: its summary.json."""
    summary = json.loads((RESULTS / "demo.json").read_text())
    stages = [name for name in summary["evaluations"] if name != "teacher"]
    names = {
        "reverse_kl/own_samples": "reverse KL on the student's own samples, nats/token (the objective)",
        "reverse_kl/references": "reverse KL on reference answers, nats/token",
        "rouge_l/greedy": "ROUGE-L, greedy",
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
    return markdown(["held-out prompts", *stages, f"change in stage {stages[-1]}"], rows) + "\n\n" + note


def gpu_table() -> str:
    """What the compiled kernels of both GPU backends cost on bf16 rows, and the bandwidth that they allow."""
    results = json.loads((RESULTS / "gpu-static.json").read_text())
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
            row += [f"{found[a]['headroom']:.2f}× ({found[a]['bound_by']})" for a in (80, 90)]
        rows.append(row)
    columns = ["bytes, of the least", "registers", "instructions a column", "A100", "H100"]
    header = [
        "kernel",
        *(f"{backend}: {c}" if i == 0 else c for backend in ("CUDA", "Triton") for i, c in enumerate(columns)),
    ]
    note = (
        "bf16 rows of 151936 columns (row_stats_grad: 50256), registers and instructions of sm_90. A100, H100: the "
        "bandwidth that the busiest pipe allows, over the card's; above 1× memory is the limit. Counted, not timed: "
        "`python -m benchmarks.gpu_static.cuda_kernels` and `python -m benchmarks.gpu_static.triton_kernels` "
        f"(Triton {results['triton_version']}). All of `csrc/cuda` for {build['timed']} compiled in "
        f"{build['seconds']:.0f} s on {build['cores']} cores (nvcc {build['nvcc_version']})."
    )
    return markdown(header, rows) + "\n\n" + note


def training_table() -> str:
    """What the trainer's own work takes on the demo pair."""
    results = json.loads((RESULTS / "cpu.json").read_text())
    info = {b["name"]: {**b["extra_info"], **b["stats"]} for b in results["benchmarks"]}
    rollout, update = info["test_rollout"], info["test_step"]
    titles = {
        "both_models": "both models, each token drawn from their mixture",
        "student_alone": "student alone",
        "teacher_alone": "teacher alone",
        "generate_student": "student alone, `transformers.generate`",
    }
    rows = [
        [title, f"{rollout['seconds'][name]:.2f} s", f"{rollout['tokens_per_second'][name]:.0f}"]
        for name, title in titles.items()
    ]
    machine, ratio = results["machine_info"], rollout["both_over_sum_of_alone"]
    note = (
        f"{machine['cpu']['brand_raw']}, {machine['threads']} threads, torch {machine['torch']}, least of a few in "
        f"turns; both at once take {ratio:.2f}× the sum of their own times. An update from rollouts that exist, with "
        f"its text, {update['tokens']} tokens: {update['median']:.2f} s. In the run of the kernels' tables."
    )
    size = f"rollout of {rollout['sequences']} × {rollout['new_tokens']} tokens"
    return markdown([size, "time", "new tokens/s"], rows) + "\n\n" + note


def trl_table() -> str:
    """A step of our trainer beside one of TRL's."""
    results = json.loads((RESULTS / "trl.json").read_text())
    rows = [
        [
            f"{name} {row['versions'].get(name, '')}".strip(),
            f"{row['seconds']:.2f} s",
            f"{row['extra_MiB']:.0f} MiB",
        ]
        for name, row in results["rows"].items()
    ]
    note = (
        f"{results['times_faster']:.2f}× faster with {results['share_of_memory']:.2f}× of the memory; "
        f"{results['threads']} threads, median of {results['steps'] * results['processes']} steps; made by "
        f"`{results['command']}`, which says how it is made fair."
    )
    header = [f"a step of {results['prompts']} prompts × {results['new_tokens']} tokens", "time", "working memory"]
    return markdown(header, rows) + "\n\n" + note


def study_table() -> str:
    """What a reader asks first of docs/study.md, and its verdicts."""
    study = load_study(ROOT / "recipes" / "study" / "study.yaml")
    study = dataclasses.replace(study, results=ROOT / study.results)
    records = document.load_records(study)
    columns = document.metrics(study, records)
    shown = {key: columns[key] for key in ("rouge all", "rkl", "ece", "distinct", "length")}
    tables = [document.table(study, records, shown, size) for size in study.sizes]
    return "\n\n".join([*tables, document.verdicts(study, records, columns).partition("\n| ")[0].strip()])


TABLES = {
    "demo": demo_table,
    "cpu": cpu_table,
    "kernels": kernels_table,
    "linear": linear_table,
    "training": training_table,
    "trl": trl_table,
    "gpu": gpu_table,
    "study": study_table,
}


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
        stale = "README.md is not what the committed JSON gives: run python benchmarks/tables.py"
        sys.exit(0 if current == wanted else stale)
    path.write_text(wanted)


if __name__ == "__main__":
    main()
