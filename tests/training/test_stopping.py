"""A signal to a run, callback by callback: when it counts, and what its handlers leave behind."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest

from gaudi_lm.training.signals import SIGNALS, SaveOnSignal


@pytest.fixture(autouse=True)
def handlers():
    """Those of the tests themselves, which come back."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGCHLD)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored
    yield {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)


class Run:
    """What the trainer tells the callback in step 7, and what it asks for."""

    def __init__(self, folder="/nowhere"):
        self.signals, self.control = SaveOnSignal(main_rank=False), SimpleNamespace(should_save=False)
        self.args, self.state = SimpleNamespace(output_dir=str(folder)), SimpleNamespace(global_step=7)

    def tell(self, *events: str) -> bool:
        """Whether a checkpoint is to be saved after these events."""
        for event in events:
            getattr(self.signals, f"on_{event}")(self.args, self.state, self.control)
        return self.control.should_save


STEP = ("pre_optimizer_step", "step_end")


def test_a_step_is_finished_and_saved_before_the_end(tmp_path, caplog):
    """Ranks have voted when a signal comes late in a step: it then counts in the next one."""
    run = Run(tmp_path)
    with caplog.at_level("INFO", "gaudi_lm"), pytest.raises(SystemExit) as end, run.signals.watching():
        assert not run.tell(*STEP, "save", "pre_optimizer_step") and not run.signals.stopping.value
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not run.tell("step_end", "save") and run.signals.stopping.value
        assert run.tell(*STEP)
        run.tell("save")
    assert end.value.code == 128 + signal.SIGUSR1, "the first one"
    assert caplog.messages == [f"SIGUSR1: training ends after step 7; the checkpoint is {tmp_path}/checkpoint-7"]
    os.kill(os.getpid(), signal.SIGTERM)  # nothing can come between


def test_an_evaluation_is_the_last_one_too():
    run = Run()
    with run.signals.watching():
        assert not run.tell("evaluate")
        os.kill(os.getpid(), signal.SIGHUP)
        assert run.tell("evaluate") and run.signals.decided == signal.SIGHUP
    assert not (other := Run()).signals.received and not other.tell(*STEP, "evaluate", "save")


def test_what_the_flags_save_is_saved_without_a_signal():
    run = Run()
    run.control.should_save = True
    with run.signals.watching():
        assert run.tell(*STEP, "save", "evaluate", "save")


def test_handlers_come_back_where_no_signal_has_come(handlers):
    run = Run()
    with pytest.raises(KeyError), run.signals.watching():
        assert all(signal.getsignal(number) == run.signals._take for number in SIGNALS)
        raise KeyError
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    run.signals.received = signal.SIGTERM
    assert not run.tell(*STEP, "evaluate", "save"), "outside of training"


def test_a_second_interrupt_is_the_kernels():
    with (run := Run()).signals.watching():
        os.kill(os.getpid(), signal.SIGINT)
        assert run.signals.received == signal.SIGINT and signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_process_that_loads_data_goes_on():
    with (run := Run()).signals.watching():
        run.signals._process = 0  # of which it is a child
        os.kill(os.getpid(), signal.SIGINT)
        assert not run.signals.received and signal.getsignal(signal.SIGINT) == run.signals._take


def test_another_thread_than_the_main_one_takes_no_signals(handlers):
    def train() -> None:
        with Run().signals.watching():
            seen.append({number: signal.getsignal(number) for number in handlers})

    seen = []
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [handlers]


def test_nohup_is_heeded_and_not_a_shell_that_starts_a_background_job():
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with (run := Run()).signals.watching():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not run.signals.received
        os.kill(os.getpid(), signal.SIGINT)
    assert run.signals.received == signal.SIGINT


def test_a_signal_that_comes_after_the_last_step(caplog, tmp_path):
    """The results are written first, then the run ends."""
    run = Run()
    with run.signals.watching():
        os.kill(os.getpid(), signal.SIGUSR1)
    with caplog.at_level("INFO", "gaudi_lm"), pytest.raises(SystemExit) as end:
        run.signals.end_after_training(tmp_path)
    assert end.value.code == 138 and f"the model is in {tmp_path}" in caplog.text
    Run().signals.end_after_training(tmp_path)
