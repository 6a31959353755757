"""One run at a time writes to a workdir, and a killed one never blocks its restart."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from train.common import lease as module
from train.common.lease import Lease

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOLDER = """
import pathlib, sys, time
sys.path.insert(0, {root!r})
from train.common.lease import Lease
Lease(pathlib.Path({workdir!r}), print)
print("holds", flush=True)
time.sleep(600)
"""


def lines():
    said = []
    return said, said.append


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lease of tmp_path."""
    code = HOLDER.format(root=str(ROOT), workdir=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout is not None and held.stdout.readline() == "holds\n"
        yield held
        held.kill()


def elsewhere(workdir, **changes):
    """Writes the lease of a process on another host."""
    record = module._this_process() | {"host": "elsewhere", "token": "t", "renewed": 3} | changes
    (workdir / "lease.json").write_text(json.dumps(record))


def test_a_second_run_is_refused_at_once(holder, tmp_path):
    with pytest.raises(ValueError, match=f"process {holder.pid} on .* is using it"):
        Lease(tmp_path, print)


def test_a_killed_run_does_not_block_its_restart(holder, tmp_path):
    holder.kill()
    holder.wait()
    said, log = lines()
    Lease(tmp_path, log).close()
    assert not said  # nothing to watch


def test_close_gives_the_workdir_back(tmp_path):
    Lease(tmp_path, print).close()
    assert not list(tmp_path.iterdir())


def test_a_pid_that_another_process_has_now(holder, tmp_path):
    record = json.loads((tmp_path / "lease.json").read_text())
    (tmp_path / "lease.json").write_text(json.dumps(record | {"started": "1"}))
    Lease(tmp_path, print).close()


def test_one_of_another_host_that_is_renewed_is_refused(tmp_path):
    elsewhere(tmp_path)

    def log(line):
        assert "elsewhere was using it" in line
        elsewhere(tmp_path, renewed=4)

    with pytest.raises(ValueError, match="on elsewhere is using it"):
        Lease(tmp_path, log)


def test_one_of_another_host_that_is_not_renewed_has_expired(tmp_path):
    elsewhere(tmp_path)
    said, log = lines()
    Lease(tmp_path, log, watch_seconds=0.5).close()
    assert len(said) == 1


def test_a_restart_of_the_same_slurm_job_waits_for_nothing(tmp_path, monkeypatch):
    elsewhere(tmp_path, job="77", restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    said, log = lines()
    Lease(tmp_path, log).close()
    assert not said


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}'])
def test_a_damaged_lease_holds_nothing(tmp_path, text):
    (tmp_path / "lease.json").write_text(text)
    Lease(tmp_path, print).close()


def test_it_is_renewed_and_its_loss_is_noticed(tmp_path):
    held = Lease(tmp_path, print, renew_seconds=0.05)
    while json.loads((tmp_path / "lease.json").read_text())["renewed"] < 2:
        time.sleep(0.01)
    held.check()
    elsewhere(tmp_path)
    while not held.lost:
        time.sleep(0.01)
    with pytest.raises(OSError, match="another process has taken it over"):
        held.check()
    held.close()
    assert json.loads((tmp_path / "lease.json").read_text())["host"] == "elsewhere"
