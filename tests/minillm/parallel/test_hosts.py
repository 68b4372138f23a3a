"""Three hosts as network namespaces on a bridge: one of them dies, or its cable is cut, and the others go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from filelock import FileLock

BRIDGE, HOSTS, PORT = "minillm0", 3, 29713
PEER_SECONDS = 30
STEPS, STAGES = 40, 2


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def may_make_networks():
    if shutil.which("ip") is None or ip("link", "add", "minillm-try", "type", "bridge", check=False).returncode:
        return False
    ip("link", "del", "minillm-try")
    return True


@pytest.fixture
def network():
    if not may_make_networks():
        pytest.skip("needs the command ip and the right to make network devices (CAP_NET_ADMIN)")
    names = [f"minillm-host{i}" for i in range(HOSTS)]

    def clear():
        for i, name in enumerate(names):
            for pid in ip("netns", "pids", name, check=False).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            ip("netns", "del", name, check=False)
            ip("link", "del", f"mllm{i}", check=False)
        ip("link", "del", BRIDGE, check=False)

    lock = FileLock(f"/tmp/{BRIDGE}.lock")  # one network of these names at a time
    lock.acquire()
    clear()
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    for i, name in enumerate(names):
        ip("netns", "add", name)
        ip("link", "add", f"mllm{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", f"mllm{i}", "master", BRIDGE, "up")
        for words in (
            ("addr", "add", f"10.77.0.{10 + i}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", name, *words)
    yield names
    clear()
    lock.release()


def start(files, names, i):
    """torchrun on a host, as docs/scale.md says."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2:3", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"10.77.0.10:{PORT}", "--rdzv-id", "run",
        "--rdzv-conf", f"is_host={int(i == 0)},last_call_timeout=3,join_timeout=120",
        "--local-addr", f"10.77.0.{10 + i}",
        "--max-restarts", "5", "-m", "minillm", "train", str(files / "recipe.yaml"), "--method=kd",
        f"--optim.steps={STEPS}", "--optim.batch_size=6",
        "--rollout.batch_size=6", "--objective.pt_batch_size=6", "--log.checkpoint_every=1",
        f"--output={files / 'run'}",
    ]  # fmt: skip
    environment = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "MINILLM_PEER_SECONDS": str(PEER_SECONDS)}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with (files / f"host{i}.log").open("w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", names[i], *command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def steps(files):
    path = files / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("event", ["killed", "cable cut"])
def test_two_of_three_hosts_go_on(files, network, event):
    hosts = [start(files, network, i) for i in range(HOSTS)]
    deadline = time.monotonic() + 400
    while len(steps(files)) < 4:
        assert time.monotonic() < deadline and all(host.poll() is None for host in hosts), logs(files)
        time.sleep(0.02)
    if event == "killed":
        for pid in ip("netns", "pids", network[2]).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
    else:
        ip("link", "set", "mllm2", "down")
    for host in hosts[:2]:
        assert host.wait(max(1, deadline - time.monotonic())) == 0, logs(files)
    assert steps(files) == list(
        range(1, STAGES * STEPS + 1)
    )  # each once: what was computed after the last checkpoint is cut off
    assert (files / "run" / "model" / "model.safetensors").exists()


def logs(files):
    return "\n".join(f"---- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(files.glob("host*.log")))
