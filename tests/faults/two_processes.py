"""Two processes of a run, for tests that lose one of them."""

import contextlib
import socket
import subprocess
import sys
import time

from runs import environment

from artifex.scaling.checkpoints import Checkpoints

LIMIT = 4  # seconds without a sign of life


@contextlib.contextmanager
def started(folder, *words, only=(0, 1), program=None, env=lambda process: {}):
    """Processes 0 and 1 of a run, or one of them; whatever is left of them is ended at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    begin = ["-m", "artifex.train"] if program is None else program
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = []
    for process in only:
        meeting = [f"--device.coordinator=127.0.0.1:{port}", "--device.processes=2", f"--device.process-id={process}"]
        command = [sys.executable, *begin, "c.json", *words, *meeting, f"--device.lost-after={LIMIT}"]
        running.append(subprocess.Popen(command, cwd=folder, env=environment(**env(process)), **pipes))
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.communicate()


def script(folder, text, *words):
    """The text as a program, to be started with these words."""
    (folder / "program.py").write_text(text)
    return [str(folder / "program.py"), *words]


def saved(run, processes, after=0, within=120):
    """Return once a step after that one is saved; training goes on."""
    until = time.monotonic() + within
    while time.monotonic() < until and all(process.poll() is None for process in processes):
        with Checkpoints(run / "checkpoints") as checkpoints:
            if max(checkpoints.steps(), default=0) > after:
                return
        time.sleep(0.1)
    raise AssertionError([process.communicate(timeout=30) for process in processes])


def left(process, within):
    """Exit code and stderr of a process that leaves in so many seconds."""
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < within, err
    return process.returncode, err


def is_one_sentence(err):
    return err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
