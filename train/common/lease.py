"""The lease on a workdir: one run at a time writes to it.

WORKDIR/lease.json names the process that holds it and is renewed while that process lives. A second
run is refused. A run that was killed never blocks its own restart: on the same host its process is
seen to be gone, and from another host its lease is seen not to be renewed.
"""

import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from modernbert_jax.checkpoint.files import write_text

RENEW_SECONDS = 10.0
# How long a lease of another host is watched. Its own clock may be wrong, so that only a change
# shows whether it is alive; a file system on a network may show a change some seconds late.
WATCH_SECONDS = 35.0
_FILE = "lease.json"


class Lease:
    """Holds a workdir until `close`. Paths are pathlib's or, in a bucket, etils' epath.

    Raises ValueError if another process holds it. log: called with one line if the lease of another
    host has to be watched.
    """

    def __init__(
        self,
        workdir: Any,
        log: Callable[[str], None],
        renew_seconds: float = RENEW_SECONDS,
        watch_seconds: float = WATCH_SECONDS,
    ):
        self.path, self._renew_seconds = workdir / _FILE, renew_seconds
        self._record = _this_process() | {"token": uuid.uuid4().hex, "renewed": 0}
        self.lost = False  # whether another process has taken the workdir
        found = _read(self.path)
        if found is not None and _alive(found, self.path, log, watch_seconds):
            raise ValueError(
                f"workdir {workdir}: process {found.get('pid')} on {found.get('host')} is using it "
                f"{_job(found)}; wait for it, stop it, or choose another --workdir"
            )
        self._take(found)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _take(self, found: dict[str, Any] | None) -> None:
        """Writes the lease; of two processes that start at once one is refused."""
        text = json.dumps(self._record)
        if found is None and isinstance(self.path, pathlib.Path):
            try:
                with open(self.path, "x") as file:
                    file.write(text)
                return
            except FileExistsError:
                pass  # it appeared just now, or it is damaged
        write_text(self.path, text)
        time.sleep(0.2)  # another one that saw the same old lease writes within this time
        self._check()
        if self.lost:
            raise ValueError(
                f"workdir {self.path.parent}: another process has just started in it; choose "
                "another --workdir"
            )

    def _check(self) -> None:
        found = _read(self.path)
        self.lost = found is not None and found.get("token") != self._record["token"]

    def _renew(self) -> None:
        while not self._end.wait(self._renew_seconds):
            try:
                self._check()
                if self.lost:
                    return
                self._record["renewed"] += 1
                write_text(self.path, json.dumps(self._record))
            except OSError:
                continue  # a full disk or a short outage of the network: the next one may succeed

    def check(self) -> None:
        """Raises OSError if another process has taken the workdir since."""
        if self.lost:
            raise OSError(
                f"workdir {self.path.parent}: another process has taken it over while this one "
                "did not renew its lease; this one stops and saves nothing"
            )

    def close(self) -> None:
        """Gives the workdir back."""
        self._end.set()
        self._thread.join()
        try:
            self._check()
            if not self.lost:
                self.path.unlink(missing_ok=True)
        except OSError:
            pass  # it expires


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "processes": _namespace(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _namespace() -> str:
    """Which processes this one can see: two containers may share a host's name, not its ids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""


def _started(pid: int) -> str | None:
    """When a process of this host started; "" if that is unknown, None if there is none."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # it belongs to another user
    return ""


def _read(path: Any) -> dict[str, Any] | None:
    """The lease; None without one. A damaged one holds nothing."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else None


def _alive(
    found: dict[str, Any], path: Any, log: Callable[[str], None], watch_seconds: float
) -> bool:
    """Whether the process that holds a lease still runs."""
    ours = _this_process()
    if ours["job"] and ours["job"] == found.get("job") and ours["restart"] != found.get("restart"):
        return False  # SLURM restarts a job only after it has ended
    if all(ours[name] == found.get(name) for name in ("host", "processes")):
        return found["pid"] != ours["pid"] and _started(found["pid"]) == found.get("started")
    log(
        f"workdir {path.parent}: process {found['pid']} on {found.get('host')} was using it; "
        f"watching for up to {watch_seconds:.0f} s whether it still does"
    )
    end = time.monotonic() + watch_seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, watch_seconds / 10))
        now = _read(path)
        if now is None:
            return False
        if now != found:
            return True
    return False


def _job(found: dict[str, Any]) -> str:
    return f"(SLURM job {found['job']})" if found.get("job") else "(its run has not ended)"
