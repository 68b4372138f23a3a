"""What the tables are made of: results that are committed, and their rows in Markdown."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def rows_of(results: dict, group: str) -> dict[str, dict]:
    """{implementation: {"ms": median, **extra_info}} of one benchmark group."""
    found = {}
    for b in results["benchmarks"]:
        if b["group"] == group:
            found[b["extra_info"]["implementation"]] = {"ms": b["stats"]["median"] * 1e3, **b["extra_info"]}
    return found


def shape_of(row: dict) -> str:
    return f"{row['dtype']} {row['shape'].replace('x', ' × ')}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def machine(results: dict) -> str:
    info = results["machine_info"]
    return f"{info['cpu']['brand_raw']}, {info['threads']} threads, torch {info['torch']}"
