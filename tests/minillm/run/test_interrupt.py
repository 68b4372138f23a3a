"""Signals that ask a run to stop."""

import os
import signal

import pytest

from minillm.run.interrupt import SIGNALS, Interrupt, exit_on_signal


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_a_terminal_that_closes_does_not_stop_what_nohup_has_started():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exit_on_signal(), Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.noted
            os.kill(os.getpid(), signal.SIGUSR1)
            assert interrupt.noted
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in SIGNALS
