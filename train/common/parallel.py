"""Runs one function over many items, in this process or in several."""

import concurrent.futures
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm


def run_all(
    function: Callable[[Any], None], items: Sequence[Any], description: str, workers: int = 1
) -> None:
    """Calls the function with each item; it writes its results to files and returns nothing.

    workers: number of processes; with 1, everything runs in this one. The function and the items
    are pickled. The first exception stops the run and is raised.
    """
    with tqdm(total=len(items), desc=description, disable=not sys.stderr.isatty()) as bar:
        if workers <= 1 or len(items) <= 1:
            for item in items:
                function(item)
                bar.update()
            return
        # Not forked: the parent may have threads. Each worker tokenizes in one thread.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            min(workers, len(items)), context, initializer=_one_thread
        ) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
