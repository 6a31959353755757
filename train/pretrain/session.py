"""One start of a run: what its phases share, and the log of its steps."""

from __future__ import annotations

import math
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ..common import flops
from ..common.hosts import is_first, log
from ..common.lease import Lease
from ..common.metrics import MetricsWriter
from ..common.progress import Progress, duration
from ..common.watch import Goodput, Profile, Spikes, Stall
from .checkpoint import Diverged
from .config import TrainConfig
from .data import Batch, Position
from .step import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


TIMED_STEPS = 10  # after which the remaining time is known well enough


class Session:
    """What the phases of one start share: model and tokenizer, metrics, monitors, stop signal."""

    def __init__(
        self,
        config: TrainConfig,
        trainer: Trainer,
        workdir: Any,
        tokenizer: PreTrainedTokenizerFast,
        step: int,
        lease: Lease | None = None,
    ):
        self.config, self.trainer = config, trainer
        self.workdir, self.tokenizer, self.lease = workdir, tokenizer, lease
        self.writer = MetricsWriter(workdir, step, config.wandb) if is_first() else None
        self.goodput = Goodput(workdir / "goodput.jsonl" if is_first() else None, step)
        self.spikes = Spikes()
        self.stall = Stall(config.stall_minutes)
        self.profile = Profile(config.profile_step, config.profile_steps, str(workdir / "profile"))
        self.signal = StopSignal()
        self.clock = SaveClock(config.checkpoint_minutes)
        # What all processes know to be wanted, because a step has summed their flags.
        self.stopped = self.save_due = False
        self.timed = 0  # steps of this start whose time counts

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Writes metrics, on the first process only."""
        if self.writer is not None:
            self.writer.write(kind, step, **values)

    def publish(self) -> None:
        """Copies the metrics to a workdir in a bucket."""
        if self.writer is not None:
            self.writer.publish()

    def flags(self, batch: Batch) -> dict[str, np.ndarray]:
        """Returns {"stop", "save"}: [A, local, 1], with a positive sum over the batch if wanted.

        The hosts' clocks differ: the first one's decides when to save.
        """
        shape = (*batch.arrays["labels"].shape[:2], 1)
        if self.lease is not None:
            self.lease.check()
        wanted = {"stop": self.signal.received, "save": is_first() and self.clock.due()}
        return {name: np.full(shape, flag, np.int32) for name, flag in wanted.items()}

    def close(self) -> None:
        """Ends the monitors and closes the files."""
        self.stall.close()
        self.profile.close()
        self.signal.close()
        if self.writer is not None:
            self.writer.close()


class StopSignal:
    """Notes SIGTERM (preemption) and Ctrl-C, so that the loop saves a checkpoint and stops.

    A second Ctrl-C leaves at once, as KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received = self.interrupted = False
        self._previous: dict[signal.Signals, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        except ValueError:  # not the main thread, which alone may handle signals
            pass

    def _receive(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if self.received:
                raise KeyboardInterrupt
            self.interrupted = True
            print("saving after this step; Ctrl-C again leaves at once", file=sys.stderr)
        self.received = True

    def close(self) -> None:
        """Restores the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class SaveClock:
    """Reports when the next checkpoint is due by the clock; None: never."""

    def __init__(self, minutes: float | None):
        self.seconds, self._saved = 60.0 * (minutes or 0.0), time.monotonic()

    def due(self) -> bool:
        """Returns whether `seconds` have passed since the last save."""
        return 0 < self.seconds <= time.monotonic() - self._saved

    def saved(self) -> None:
        """Starts again from 0."""
        self._saved = time.monotonic()


class StepLog:
    """Logs the steps of a phase, each once the next one has been dispatched.

    The host thus never makes the devices wait: it fetches numbers of a step while the next one
    runs. index: of the phase. tokens: its clock at the start.
    """

    def __init__(self, session: Session, index: int, tokens: int):
        self.session, self.phase = session, session.config.phases[index]
        phase, self._later = self.phase, sum(p.tokens for p in session.config.phases[index + 1 :])
        self.count = 0  # steps added
        self._pending: tuple[int, dict[str, jax.Array], dict[str, Any], Batch] | None = None
        self._tokens = 0  # since the first step, which compiles
        self._first: dict[str, float] = {}  # goodput's seconds at the end of the first step
        self.bar = Progress(
            total=phase.tokens, initial=tokens, unit=" tok", unit_scale=True,
            desc=f"{phase.name} (mask {phase.mlm_probability:.0%})", disable=not is_first(),
        )  # fmt: skip

    def add(
        self, step: int, metrics: Any, batch: Batch, position: Position, learning_rate: float
    ) -> None:
        """Takes the metrics of a step that was dispatched, and logs the step before it."""
        facts = {
            "phase": self.phase.name,
            "learning_rate": learning_rate,
            "total_tokens": position.total_tokens,
            "phase_tokens": position.phase_tokens,
            "batch_size": batch.sequences,
            "padding": 1.0 - batch.tokens / (batch.sequences * self.session.config.sequence_length),
            "epoch": batch.epoch,
        }
        self.flush()
        self._pending = (step, metrics, facts, batch)
        self.count += 1

    def flush(self) -> None:
        """Logs the last step. Raises Diverged if its loss or gradient is not finite."""
        if self._pending is None:
            return
        session = self.session
        (step, metrics, facts, batch), self._pending = self._pending, None
        with session.goodput.doing("steps"):
            values = {name: float(value) for name, value in metrics.items()}
        session.stopped = values.pop("stop") > 0
        session.save_due = values.pop("save") > 0
        speeds = self._speeds(batch, values["masked"])
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise Diverged(
                f"step {step}: the loss is {values['loss']}, the gradient norm "
                f"{values['grad_norm']}"
            )
        if spike := session.spikes(step, values["loss"]):
            log(spike)
        goodput = session.goodput.share()
        session.write("train", step, **values, **facts, **speeds, goodput=goodput)
        self._log_remaining(facts["phase_tokens"], speeds["tokens_per_second"])
        self.bar.update(batch.tokens)
        if step % session.config.log_every == 0 or sys.stderr.isatty():
            mfu = f" mfu {speeds['mfu']:.1%}" if "mfu" in speeds else ""
            self.bar.set_postfix_str(
                f"step {step} loss {values['loss']:.3f} acc {values['accuracy']:.1%} "
                f"{speeds['tokens_per_second'] / 1e3:.1f}k tok/s{mfu} pad {facts['padding']:.1%} "
                f"wait {speeds['waiting']:.0%}",
                refresh=False,
            )

    def _log_remaining(self, tokens: int, speed: float) -> None:
        """Logs once the time that the rest of the run will take. tokens: the phase's clock."""
        self.session.timed += speed > 0  # not the first step, which compiles
        rest = max(0, self.phase.tokens - tokens) + self._later
        if speed > 0 and self.session.timed == TIMED_STEPS and rest:
            log(
                f"about {duration(rest / speed)} of training remain: {rest:,} tokens at "
                f"{speed:,.0f} tokens/s"
            )

    def _speeds(self, batch: Batch, masked: float) -> dict[str, float]:
        """Returns tokens per second, in total and per device, share of time spent waiting, MFU.

        They are means since the phase's first step, without evaluation and saving.
        """
        spent = self.session.goodput.since_start()
        if not self._first:
            self._first = spent
            speed = waiting = 0.0
        else:
            waited = spent["waiting"] - self._first["waiting"]
            seconds = max(waited + spent["steps"] - self._first["steps"], 1e-9)
            self._tokens += batch.tokens
            speed, waiting = self._tokens / seconds, waited / seconds
        trainer = self.session.trainer
        devices = trainer.mesh.devices
        kind, per_device = devices.flat[0].device_kind, speed / devices.size
        speeds = {"tokens_per_second": speed, "tokens_per_second_device": per_device}
        speeds["waiting"] = waiting
        lengths = flops.segment_lengths(batch.arrays["segment_ids"])
        # `model_flops` counts the gradients of all weights, which adapters do without.
        complete = self.session.config.lora_rank is None
        if kind in flops.PEAK and len(lengths) and complete:
            predicted = masked * lengths.sum() / batch.tokens  # of this process
            model = flops.model_flops(trainer.model_config, lengths, predicted)
            speeds["mfu"] = flops.mfu(per_device, model.train / lengths.sum(), kind)
        return speeds

    def close(self) -> None:
        """Closes the progress bar."""
        self.bar.close()
