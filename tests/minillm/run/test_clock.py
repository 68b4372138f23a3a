"""Where the time of a step went, and that asking does not slow it down."""

import pytest
import torch

from minillm.run import clock
from minillm.run.clock import Clock


def test_every_moment_belongs_to_the_innermost_phase(monkeypatch):
    moments = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0])
    monkeypatch.setattr(clock, "_now", lambda: next(moments))
    ours = Clock()
    with ours("rollout"), ours("score"):
        pass
    found = {name: value for name, value in ours.reset().items() if name.startswith("time/")}
    assert found == {"time/update": 1.0 + 16.0, "time/rollout": 2.0 + 8.0, "time/score": 4.0}
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
