"""python -m train finetune: a task over several seeds and a grid of settings, with its scores.

The recipe is that of the reference: AdamW, linear decay without warm-up, gradients clipped to norm
1, and the epoch with the best validation score. `--backend torch` fine-tunes any model of
transformers through the same code, with the examples in the same order.
"""

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from modernbert_jax.checkpoint.files import write_text
from modernbert_jax.checkpoint.hf import write_card
from modernbert_jax.tokenizer import max_tokens

from ..common.progress import Progress
from ..common.records import read_object
from .card import finetuning_facts
from .config import FinetuneConfig
from .encode import encode
from .jax_backend import JaxBackend, JaxModel
from .report import plot, point_name, summarize, table
from .scores import task_scores
from .tasks import task_named
from .tasks.task import USUAL, Columns, Data, Task, with_shown_labels
from .torch_backend import TorchBackend, TorchModel

# These settings change no run's result, so a command may be resumed with other values.
_FREE = {"out", "seeds", "grid", "devices", "save_model"}


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Runs all seeds of all points of the grid; returns the content of OUT/results.json.

    Writes OUT/POINT/seed-N/result.json for each run, OUT/results.json, OUT/table.md, OUT/curves.png
    and the best model to OUT/model. The same command resumes after an interruption: finished runs
    are not repeated. Raises ValueError or FileNotFoundError with one line for bad input.
    """
    experiment = Experiment(config)
    counts = ", ".join(f"{len(s)} {name}" for name, s in experiment.splits.items())
    print(f"{config.task}: {counts}; {len(experiment.data.labels)} labels", flush=True)
    for what in ("skipped", "kept"):
        for reason, count in getattr(experiment.data, what).items():
            print(f"  {what}, {reason}: {count:,}", flush=True)
    cut = {name: sum(e.truncated for e in s) for name, s in experiment.splits.items()}
    if any(cut.values()):
        counts = ", ".join(f"{count:,} {name}" for name, count in cut.items() if count)
        print(f"  truncated to {experiment.max_length} tokens: {counts}", flush=True)
    points = config.points()
    jobs = [(i, seed) for i in range(len(points)) for seed in config.seeds]
    free = list(jax.local_devices()[: config.devices]) if config.backend == "jax" else [None]
    if config.devices > len(free):
        raise ValueError(f"devices: expected at most {len(free)}, got {config.devices}")

    def job(item: tuple[int, int]) -> dict[str, Any]:
        index, seed = item
        device = free.pop()  # as many threads as devices, so one is free
        try:
            with jax.default_device(device):
                return experiment.run(points[index], seed)
        finally:
            free.append(device)

    with concurrent.futures.ThreadPoolExecutor(config.devices) as pool:
        results = list(pool.map(job, jobs))
    summary = summarize(config, experiment.task, experiment.data.labels, results)
    write_text(experiment.out / "results.json", json.dumps(summary, indent=1) + "\n")
    text = table(experiment.task, summary, results)
    write_text(experiment.out / "table.md", text)
    experiment.write_card(summary)
    names = [f"{point_name(config, points[i])} seed {seed}" for i, seed in jobs]
    plot(experiment.out / "curves.png", experiment.task.metric, names, results)
    print(text)
    return summary


def load_data(task: Task, config: FinetuneConfig) -> Data:
    """Reads the files of a task. Raises ValueError for columns that the task does not take."""
    columns = Columns(config.text_column, config.text_pair_column, config.label_column)
    if task.takes_columns:
        return task.load(pathlib.Path(config.data), columns)
    if columns != USUAL:
        raise ValueError(
            f"--text-column, --text-pair-column, --label-column: the files of task {task.name} "
            "have names of their own; leave them out, or use --task classification or multilabel"
        )
    return task.load(pathlib.Path(config.data))


class Experiment:
    """What the runs of a command share: the data, the backend and the best model so far."""

    def __init__(self, config: FinetuneConfig):
        config.validate()
        self.config = config
        self.out = pathlib.Path(
            f"runs/finetune/{config.task}" if config.out is None else config.out
        )
        self.task = task_named(config.task)
        data = load_data(self.task, config)
        self.data = with_shown_labels(data, config.data, config.allow_long_labels)
        backend = JaxBackend if config.backend == "jax" else TorchBackend
        self.backend = backend(config, self.task.kind, self.data.labels)
        tokenizer = self.backend.tokenizer
        limit = min(config.max_length, self.backend.max_length)
        self.max_length = max_tokens(tokenizer, limit)
        self.splits = {
            split: encode(getattr(self.data, split), tokenizer, self.task.kind, self.max_length)
            for split in ("train", "validation", "test")
        }
        for split, examples in self.splits.items():
            if not examples:
                raise ValueError(f"{config.task}: {config.data} has no example in {split}")
        self.lock = threading.Lock()

    def run(self, config: FinetuneConfig, seed: int) -> dict[str, Any]:
        """Trains one seed of one point, picks the best epoch and scores the test split.

        The result of a finished run with the same settings is read back instead.
        """
        folder = self.out / point_name(self.config, config) / f"seed-{seed}"
        settings = {**dataclasses.asdict(config), "seed": seed}
        settings = {k: v for k, v in settings.items() if k not in _FREE}
        result_file = folder / "result.json"
        if result_file.exists():
            found = read_object(result_file, "settings")
            if found["settings"] == json.loads(json.dumps(settings)):
                return found
            raise ValueError(
                f"{result_file} has other settings; choose another --out, or remove this file"
            )
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        model = self.backend.start(config, seed)
        train, metric = self.splits["train"], self.task.metric
        step_size = config.batch_size * config.gradient_accumulation_steps
        steps = -(-len(train) // step_size) * config.epochs
        best_score, best_epoch, best_weights = -1.0, 0, None
        losses: list[float] = []
        seconds: list[float] = []
        epochs: list[dict[str, float]] = []
        bar = Progress(total=steps, desc=f"{folder.parent.name} seed {seed}", unit=" steps")
        for epoch in range(1, config.epochs + 1):
            order = np.random.default_rng((seed, epoch - 1)).permutation(len(train))
            for micro_batches in _steps(order, config):
                learning_rate = config.learning_rate * (1.0 - len(losses) / steps)
                examples = [[train[i] for i in batch] for batch in micro_batches]
                before = time.perf_counter()
                losses.append(model.step(examples, learning_rate))
                seconds.append(time.perf_counter() - before)
                bar.update()
                bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
                if not math.isfinite(losses[-1]):
                    raise RuntimeError(
                        f"seed {seed}, step {len(losses)}: the loss is {losses[-1]}; lower "
                        "--learning-rate"
                    )
            score = self.score(model, "validation", config.batch_size)[metric]
            epochs.append({"epoch": epoch, metric: score})
            if score > best_score:
                best_score, best_epoch, best_weights = score, epoch, model.weights()
        bar.close()
        assert best_weights is not None
        if best_epoch != config.epochs:
            model.load(best_weights)
        result = {
            "settings": settings,
            "best_epoch": best_epoch,
            "validation": {metric: best_score},
            "test": self.score(model, "test", config.batch_size),
            "epochs": epochs,
            "losses": losses,
            "seconds": time.perf_counter() - started,
            "median_step_seconds": float(np.median(seconds)),  # without the steps that compile
        }
        if config.save_model:
            self._keep_if_best(model, best_weights, best_score, folder)
        write_text(result_file, json.dumps(result, indent=1) + "\n")
        return result

    def score(self, model: JaxModel | TorchModel, split: str, batch_size: int) -> dict[str, Any]:
        """The scores of a model on a split."""
        examples = self.splits[split]
        # Batches of examples of similar length have few shapes.
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
        logits: dict[int, np.ndarray] = {}
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            logits.update(zip(batch, model.predict([examples[i] for i in batch]), strict=True))
        in_order = [logits[i] for i in range(len(examples))]
        return task_scores(self.task.kind, self.data.labels, examples, in_order)

    def _keep_if_best(
        self, model: JaxModel | TorchModel, weights: Any, score: float, folder: pathlib.Path
    ) -> None:
        """Writes OUT/model if no run had a better validation score."""
        with self.lock:
            record = self.out / "model" / "score.json"
            if read_object(record, "validation").get("validation", -math.inf) >= score:
                return
            model.save(weights, self.out / "model")
            run = folder.relative_to(self.out).as_posix()
            write_text(record, json.dumps({"validation": score, "run": run}) + "\n")

    def write_card(self, summary: dict[str, Any]) -> None:
        """Writes the model card of OUT/model, which reports all seeds, if there is a model."""
        record = self.out / "model" / "score.json"
        run = read_object(record).get("run")
        if not run:
            return
        saved = read_object(self.out / run / "result.json")
        counts = {split: len(examples) for split, examples in self.splits.items()}
        facts = finetuning_facts(self.config, self.task, counts, summary, saved)
        write_card(self.out / "model", facts)


def _steps(order: np.ndarray, config: FinetuneConfig) -> Iterator[list[list[int]]]:
    """The indices of the examples of each step, by micro-batch."""
    step_size = config.batch_size * config.gradient_accumulation_steps
    for first in range(0, len(order), step_size):
        step = order[first : first + step_size].tolist()
        yield [step[i : i + config.batch_size] for i in range(0, len(step), config.batch_size)]
