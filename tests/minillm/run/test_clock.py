"""Where the time of a step went, and that asking does not slow it down."""

import time

import pytest
import torch

from minillm.run import clock
from minillm.run.clock import Clock


def test_every_moment_belongs_to_the_innermost_phase():
    ours = Clock()
    with ours("rollout"):
        time.sleep(0.02)
        with ours("score"):
            time.sleep(0.01)
    found = ours.reset()
    assert found["time/rollout"] == pytest.approx(0.02, abs=0.015) and found["time/score"] == pytest.approx(
        0.01, abs=0.009
    )
    assert ours.reset().keys() & {"time/rollout", "time/score"} == set()


def test_on_a_gpu_phases_end_without_waiting(monkeypatch):
    """A device whose queue is worked off a second an event, and a host that is far ahead of it."""
    waited = []

    class Event:
        recorded = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.recorded += 1
            self.at = Event.recorded

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, later):
            assert waited and waited[-1] >= later.at, "the device has not come there yet"
            return 1000.0 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("a phase waited for the device"))
    monkeypatch.setattr(clock, "_peak", lambda: None)
    ours = Clock()
    for _ in range(4):  # micro-batches of kd
        with ours("score"):
            pass
    assert not waited
    assert ours.reset() == {"time/update": 5.0, "time/score": 4.0}
    assert len(waited) == 1
