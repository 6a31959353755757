"""No worker outlives the run that started it, however that run ends."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# As the command line ends after a failure: without waiting for threads.
CODE = """
import time
from train.cli import leave
from train.common.parallel import run_all
try:
    run_all(time.sleep, {items}, "", workers=2)
except ValueError:
    leave(2)
except KeyboardInterrupt:
    leave(130)
"""


def test_a_failed_run_ends_its_children():
    """Also those of other libraries, as Grain's workers."""
    code = (
        "import multiprocessing, time; from train.cli import leave;"
        "context = multiprocessing.get_context('spawn');"
        "context.Process(target=time.sleep, args=(600,)).start(); leave(2)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60
        ).returncode
        == 2
    )


@pytest.mark.parametrize(
    "sign, code",
    [(None, 2), (signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)],
)
def test_the_pipe_of_stdout_closes(sign, code):
    """It does once no process has it. An item fails, or the run is sent a signal in the midst."""
    items = [600, 600] if sign else [600, -1]  # seconds to sleep
    command = [sys.executable, "-c", CODE.format(items=items)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    children = pathlib.Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while sign and run.poll() is None and len(children.read_text().split()) < 3:
        time.sleep(0.01)  # two workers and Python's own tracker of semaphores
    if sign:
        run.send_signal(sign)
    run.communicate(timeout=60)
    assert run.returncode == code
