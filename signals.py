"""Signals that ask a run to stop, and how its process ends after them.

    SIGINT   Ctrl-C                                        status 130 in a shell
    SIGTERM  Slurm before a time limit or a preemption     status 143
    SIGHUP   the terminal has closed; not under nohup      status 129
"""
import contextlib
import os
import signal
import subprocess
import sys
import threading

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def catch_signals(caught, at_end):
    """From now on signals only append their numbers to a list, caught. at_end: an ExitStack, which
    gives the former handlers back."""
    def note(number, _):
        caught.append(number)
        if len(caught) == 1 and os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):  # print could be interrupted by itself
                os.write(2, f"{name}: finishing this step, then saving\n".encode())
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            at_end.callback(signal.signal, number, signal.signal(number, note))


def ignore_signals(_):
    """worker_init_fn of a loader. Ctrl-C and a lost terminal reach every process of the terminal,
    SIGTERM often every process of a job. The main process decides when to stop. So only its own
    SIGTERM ends a worker, which it sends to one that hangs."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not say who has sent a signal
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        return
    main_process = os.getppid()

    def wait_for_main():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main_process:
            pass
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # of all threads that begin later
    threading.Thread(target=wait_for_main, daemon=True).start()


def run_process(command, output=None):
    """Run a program to its end: (its status, the first signal that reached this process meanwhile,
    or 0). Signals are passed on, so a run in that program saves first. command: a list of words;
    output: a file for what it prints, None = the output of this process."""
    process, caught = subprocess.Popen(command, stdout=output), []

    def pass_on(number, _):
        caught.append(number)
        process.send_signal(number)
    with contextlib.ExitStack() as at_end:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                at_end.callback(signal.signal, number, signal.signal(number, pass_on))
        status = process.wait()
    return status, caught[0] if caught else 0


def end_by(number):
    """End this process by a signal, as if nothing had caught it; 0 = do nothing.

    A shell sees status 128 + number. Its loop ends at Ctrl-C only if the program died of the signal
    itself: after exit(130) the loop starts the next program.
    """
    if number:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        sys.exit(128 + number)  # the first process of a container survives its own signals
