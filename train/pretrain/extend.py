"""Extending a run (`--extend`): further phases at its end, or a larger budget.

A larger budget moves the decay, so that training starts again from the last checkpoint whose steps
all began before it. `Checkpoints` keeps that one for each phase, whatever --keep-checkpoints says.
What the run has fixed stays: the length of a sequence, the sequences of a step, the warm-ups.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .config import Phase, TrainConfig
from .data import Position

_BUDGET = ("tokens", "decay_tokens")
_WARMUPS = ("warmup_tokens", "batch_size_warmup_tokens")


@dataclasses.dataclass(frozen=True)
class Past:
    """What the last step of a checkpoint was. Stored in each checkpoint."""

    position: Position  # after the step, also if its phase ended with it
    began: int  # the phase's clock when the step began

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Past":
        """Reads what `dataclasses.asdict` has made."""
        return Past(Position(**values["position"]), values["began"])


def precedes(past: Past, phases: Sequence[Phase], index: int) -> bool:
    """Returns whether all steps up to a checkpoint are the same with a larger budget of a phase."""
    phase, where = phases[index], past.position.phase
    return where < index or (where == index and past.began < phase.tokens - phase.decay_tokens)


def kept(pasts: Mapping[Any, Past], phases: Sequence[Phase]) -> set[Any]:
    """Returns the checkpoints from which a larger budget of a phase can start.

    pasts: of each checkpoint, oldest first.
    """
    found = set()
    for index in range(len(phases)):
        found |= set([name for name in pasts if precedes(pasts[name], phases, index)][-1:])
    return found


def count_kept(phases: Sequence[Phase]) -> int:
    """Returns how many checkpoints a run keeps for larger budgets beside the newest ones."""
    points = set()
    for index, phase in enumerate(phases):
        constant = phase.tokens - phase.decay_tokens
        points.add((index, constant) if constant else (index - 1, phases[index - 1].tokens))
    # The start of the run is not kept, and the end is the newest checkpoint.
    return len([p for p in points if 0 <= p[0] and p != (len(phases) - 1, phases[-1].tokens)])


def resumed(position: Position, past: Past | None, phases: Sequence[Phase]) -> Position:
    """Returns where a checkpoint continues: in the phase of its last step if that has room now."""
    if past is None or past.position.phase_tokens >= phases[past.position.phase].tokens:
        return position
    return past.position


def check_flags(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError for phases that do not extend those of run.json, as far as flags show.

    found, wanted: the configurations as JSON.
    """
    olds, news = found["phases"], wanted["phases"]
    if len(news) < len(olds):
        raise ValueError(
            f"extend: the run has {len(olds)} phases, got {len(news)}; keep them and add others "
            "at the end"
        )
    for old, new in zip(olds, news, strict=False):
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name) and name not in (*_BUDGET, *_WARMUPS):
                raise ValueError(_refusal(new["name"], name, old.get(name), new.get(name)))


def begun(config: TrainConfig, given: TrainConfig, record: Mapping[str, Any]) -> TrainConfig:
    """Returns a derived configuration with what the run has fixed at its beginning.

    given: the flags. record: run.json, with what was derived then. A warm-up follows the budget in
    epochs only before it has been trained.
    """
    was = record["derived"]
    phases = list(config.phases)
    for index, (old, flags) in enumerate(zip(was["phases"], record["phases"], strict=True)):
        same = [name for name in _WARMUPS if flags[name] == getattr(given.phases[index], name)]
        phases[index] = dataclasses.replace(phases[index], **{name: old[name] for name in same})
    if same_budgets(given, record):
        phases = [Phase(**old) for old in was["phases"]]
    return dataclasses.replace(
        config,
        phases=tuple(phases),
        sequence_length=was["sequence_length"],
        global_batch_size=was["global_batch_size"],
    )


def same_budgets(given: TrainConfig, record: Mapping[str, Any]) -> bool:
    """Returns whether the flags set the phases and budgets of run.json."""
    return given.epochs == record["epochs"] and _plain(given.phases) == record["phases"]


def derived_record(config: TrainConfig) -> dict[str, Any]:
    """Returns what run.json keeps of a derived configuration."""
    return {
        "sequence_length": config.sequence_length,
        "global_batch_size": config.global_batch_size,
        "phases": _plain(config.phases),
    }


def _plain(phases: Iterable[Phase]) -> list[dict[str, Any]]:
    """Returns phases as JSON has them."""
    return [dataclasses.asdict(p) | {"corpus": list(p.corpus)} for p in phases]


def first_larger(phases: Sequence[Phase], record: Mapping[str, Any]) -> int | None:
    """Returns the first phase with a larger budget than in run.json; None if all are the same.

    Raises ValueError for any other change of a phase.
    """
    first = None
    for index, old in enumerate(record["derived"]["phases"]):
        new = _plain([phases[index]])[0]
        changed = [name for name in new if new[name] != old.get(name)]
        for name in changed:
            if name not in _BUDGET:
                raise ValueError(_refusal(new["name"], name, old.get(name), new[name]))
        constant = [phase["tokens"] - phase["decay_tokens"] for phase in (old, new)]
        if changed and (new["tokens"] <= old["tokens"] or constant[1] < constant[0]):
            raise ValueError(
                _refusal(new["name"], changed[0], old[changed[0]], new[changed[0]])
                + "; a larger budget has more tokens, and no fewer before the decay"
            )
        if changed and first is None:
            first = index
    return first


def _refusal(phase: str, name: str, old: Any, new: Any) -> str:
    return (
        f"extend: phase {phase}: {name} was {_number(old)}, is {_number(new)}; only a larger "
        "budget and further phases at the end can extend a run, other changes need another "
        "--workdir"
    )


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
