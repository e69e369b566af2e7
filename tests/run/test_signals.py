"""Signals that ask a run to end, and those that end it at once."""

import signal

import pytest

from tinystory.run.errors import Interrupted, Output, Stop

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture
def terminal():
    """SIGHUP as in a terminal: under nohup the tests would inherit that it is ignored."""
    before = signal.signal(HUP, signal.SIG_DFL)
    yield
    signal.signal(HUP, before)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    "first, second", [(INT, INT), (INT, TERM), (HUP, INT)]
)  # torchrun passes Ctrl-C on as INT, TERM
def test_the_first_signal_asks_for_the_end_and_the_second_ends_at_once(first, second):
    before = signal.getsignal(second)
    with Stop().listening() as stop:
        stop.check()
        signal.raise_signal(first)
        assert stop.requested == first
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(KeyboardInterrupt) as end:
            signal.raise_signal(second)
        assert end.value.args == (second,)
    assert signal.getsignal(second) is before


@pytest.mark.usefixtures("terminal")
def test_a_terminal_that_closes_asks_for_the_end_and_is_no_second_ctrl_c(monkeypatch):
    with Stop().listening() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
            assert stop.requested == signal.SIGHUP
    with Stop().listening() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested == signal.SIGINT
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with Stop().listening() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    signal.signal(signal.SIGHUP, before)
    monkeypatch.setattr(Output, "reader_gone", True)  # before the first step
    assert Stop().requested == signal.SIGPIPE
