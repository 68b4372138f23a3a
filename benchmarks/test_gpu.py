"""`python -m benchmarks.gpu` runs to its end without a card: no error, nothing wrong. And what it reads of others."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import commands, profiler
from benchmarks.gpu.measure import RUN

ROOT = Path(__file__).parents[1]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_dry(tmp_path):
    out = tmp_path / "dry.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = lines_of(out)
    assert {x["section"] for x in lines} == set(gpu.SECTIONS)
    assert "0 wrong; 0 errors" in result.stdout
    found = {(x["section"], x["name"]): x for x in lines}
    assert found["pytest", "pytest"]["collected"] > 800
    assert [x["step"] for x in found["trainer", "distill"]["steps"]] == [1, 2]
    assert {x["by"] for x in lines if x["name"] == "rollout"} == {
        "both",
        "student",
        "both, no graphs",
        "student, no graphs",
        "generate",
    }
    assert {x["dtype"] for x in lines if x["section"] == "correct" and "dtype" in x} == {
        "bfloat16",
        "float32",
        "float16",
    }


def test_a_section_that_dies_is_an_error_and_one_without_time_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(RUN, "out", tmp_path / "found.jsonl")
    monkeypatch.setattr(sys, "executable", "false")
    gpu.run("host", 30.0)
    gpu.run("correct", 30.0)
    gpu.run("rows", 5.0)
    *died, skipped = lines_of(RUN.out)
    assert len(died) == 7 and all(x["error"] == "the process ended with status 1" for x in died)
    assert died[0]["section"] == "host" and died[1]["name"] == "correct --backend cuda --dtype bfloat16"
    assert skipped == {"section": "rows", "name": "rows", "skipped": "no time left"}


def test_what_pytest_reports():
    report = """<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="4" time="2.5">
        <testcase classname="tests.test_a" name="test_1" /><testcase classname="tests.test_a" name="test_2"><skipped />
        </testcase><testcase classname="tests.test_a" name="test_3[x]"><failure message="no" /></testcase>
        <testcase classname="tests.test_b" name="test_4"><error message="no" /></testcase></testsuite></testsuites>"""
    wrong = ["tests.test_a::test_3[x]", "tests.test_b::test_4"]
    expected = {"tests": 4, "failures": 1, "errors": 1, "skipped": 1, "seconds": 2.5, "wrong": wrong}
    assert commands.counted(report) == expected


def test_what_the_profiler_reports():
    output = """==PROF== Connected to process 1
    loss
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","1","row_stats_kernel(StatsArgs, int)","GPU Speed Of Light Throughput","DRAM Throughput","%","91.25",""
"0","1","row_stats_kernel(StatsArgs, int)","GPU Speed Of Light Throughput","Duration","us","1,234.50",""
"0","1","row_stats_kernel(StatsArgs, int)","GPU Speed Of Light Throughput","","","","SOLBottleneck"
"1","1","row_grad_kernel(GradArgs, int)","Occupancy","Cluster Scheduling Policy","","PolicySpread",""
"""
    assert profiler.metrics(output) == [
        ("row_stats_kernel", {"DRAM Throughput [%]": 91.25, "Duration [us]": 1234.5}),
        ("row_grad_kernel", {"Cluster Scheduling Policy": "PolicySpread"}),
    ]
    assert profiler.metrics("==ERROR== ERR_NVGPUCTRPERM") == []
