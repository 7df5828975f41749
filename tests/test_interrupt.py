import os
import signal

import pytest

from medseg_diff.training.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_wish(number: signal.Signals):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert interrupt.requested == 0
        os.kill(os.getpid(), number)
        assert interrupt.requested == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_once_ends_the_program_with_the_code_of_the_shell(number: signal.Signals):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped, Interrupt() as interrupt, interrupt.at_once():
        os.kill(os.getpid(), number)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_a_wish_from_before_is_met_when_at_once_begins():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped, interrupt.at_once():
            raise AssertionError("went on")
    assert stopped.value.code == 128 + signal.SIGTERM


def test_after_at_once_a_signal_is_a_wish_again():
    with Interrupt() as interrupt:
        with interrupt.at_once():
            pass
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested == signal.SIGINT
