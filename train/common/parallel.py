"""One function over many items: here, in processes, or on a Beam runner."""

import concurrent.futures
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm


def run_all(
    function: Callable[[Any], None],
    items: Sequence[Any],
    what: str,
    workers: int = 1,
    beam: Sequence[str] = (),
) -> None:
    """Calls the function with each item; what it makes goes to files, and nothing comes back.

    workers: processes; with 1, this one. beam: options of a Beam pipeline, which then does it all:
    ("--runner=DirectRunner",). The function and the items are pickled. An exception ends it all.
    """
    if not items:
        return
    if beam:
        _on_beam(function, items, beam)
        return
    with tqdm(total=len(items), desc=what, disable=not sys.stderr.isatty()) as bar:
        if workers <= 1 or len(items) == 1:
            for item in items:
                function(item)
                bar.update()
            return
        # Not forked: the parent may have threads. Each worker tokenises in one thread.
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


def _on_beam(function: Callable[[Any], None], items: Sequence[Any], options: Sequence[str]) -> None:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        _ = (
            pipeline
            | apache_beam.Create(list(items))
            | apache_beam.Reshuffle()
            | apache_beam.Map(function)
        )
