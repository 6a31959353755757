"""Runs one function over many items, in this process or in several."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from .progress import Progress


def run_all(
    function: Callable[[Any], None], items: Sequence[Any], description: str, workers: int = 1
) -> None:
    """Calls the function with each item; it writes its results to files and returns nothing.

    workers: number of processes; with 1, everything runs in this one. The function and the items
    are pickled. The first exception stops the run and is raised, after all workers have ended.
    """
    with Progress(total=len(items), desc=description) as bar:
        if workers <= 1 or len(items) <= 1:
            for item in items:
                function(item)
                bar.update()
            return
        # Not forked: the parent may have threads.
        context = multiprocessing.get_context("spawn")
        before = set(multiprocessing.active_children())
        with concurrent.futures.ProcessPoolExecutor(
            min(workers, len(items)), context, initializer=_begin_worker
        ) as pool:
            try:
                futures = [pool.submit(function, item) for item in items]
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:
                # A worker in the midst of an item would outlive this process and hold its stdout.
                for worker in set(multiprocessing.active_children()) - before:
                    worker.terminate()
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker tokenizes in one thread
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when its parent has been killed."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
