"""The results as a table."""

from __future__ import annotations

import json

from .measure import RUN


def summary() -> None:
    lines = [json.loads(x) for x in RUN.out.read_text().splitlines()]
    checks, errors = [x for x in lines if "ok" in x], [x for x in lines if "error" in x]
    wrong, skipped = [x for x in checks if not x["ok"]], sum("skipped" in x for x in lines)
    print(f"\nchecks: {len(checks)} made, {len(wrong)} wrong; {len(errors)} errors; {skipped} skipped")
    for x in [*wrong[:15], *errors[:15]]:
        print("  ", json.dumps({k: v for k, v in x.items() if k != "at"})[:260])
    copy = next((x["gbps"] for x in lines if x.get("name") == "copy"), None)
    for x in lines:
        shape = str(x.get("rows", x.get("shape", "")))
        if x["section"] == "rows" and "ms" in x:
            share = f"{x['gbps'] / copy:5.2f} of copy" if copy else ""
            print(f"{x['name']:24} {x['dtype']:9} {shape:16} {x['by']:14} {x['ms']:9.3f} ms {share}")
        elif "tflops" in x:
            what, memory = x.get("what") or x.get("by") or x["name"], x.get("extra_mib") or ""
            print(f"{x['section']:9} {what:40} {shape:22} {x['ms']:9.2f} ms {x['tflops']:6.0f} TFLOP/s {memory}")
        elif x["section"] == "host" and "us" in x:
            device = f", device {x['device_us']:8.1f} us" if "device_us" in x else ""
            print(f"host {x['name']:30} {x['by']:7} {shape:14} {x['us']:8.0f} us{device}")
        elif x["section"] == "trainer" and "tokens_per_second" in x:
            print(f"rollout of {x['sequences']:4} {x['by']:10} {x['tokens_per_second']:8.0f} tokens a second")
        elif x["section"] in ("build", "pytest", "trainer", "ncu") and not x.keys() & {"error", "skipped"}:
            print(x["section"], json.dumps({k: v for k, v in x.items() if k not in ("section", "tail")})[:400])
