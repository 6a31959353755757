"""Generates synthetic clinical notes from a seed, to try a training run without any real text.

Each note is about one fictional patient and one diagnosis. The diagnosis determines the symptoms,
the findings, the laboratory test, the drugs with their doses, the clinic and the time to follow-up,
so that the rest of a note usually determines a masked word. The medicine is plausible and no more.
Vocabularies and templates are in synthetic.toml.
"""

import json
import os
import random
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Fields = dict[str, Any]  # what a note says, by the names in its template

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


class Drug(NamedTuple):
    """A drug as it is prescribed."""

    name: str
    dose: str
    schedule: str

    def __str__(self) -> str:
        return " ".join(self)


@dataclass(frozen=True)
class Diagnosis:
    """A diagnosis and everything it determines. lab_range: lowest, highest, decimals."""

    name: str
    service: str
    symptoms: tuple[str, str, str]
    sign: str
    study: str
    finding: str
    lab: str
    lab_range: tuple[float, float, int]
    lab_unit: str
    drugs: tuple[Drug, Drug]
    weeks: int  # until follow-up
    fever: bool = False
    sex: str = ""  # "" if it affects both


# [MASK] has one answer in this corpus: a title has its sex, a drug its schedule, a physician one
# service.
FILL_MASK_SENTENCES, FILL_MASK_ANSWERS = zip(*map(tuple, _DATA["fill_mask"]), strict=True)
PHYSICIANS: dict[str, str] = _DATA["physicians"]
BACKGROUND = tuple((illness, Drug(*drug)) for illness, drug in _DATA["background"])
DIAGNOSES = tuple(
    Diagnosis(
        **entry
        | {name: tuple(entry[name]) for name in ("symptoms", "lab_range")}
        | {"drugs": tuple(Drug(*drug) for drug in entry["drugs"])}
    )
    for entry in _DATA["diagnoses"]
)


def synthetic_notes(n: int, seed: int) -> Iterator[str]:
    """Generates `n` notes of 60 to 400 words, 140 on average.

    The same seed gives the same notes on every machine and Python version, and a larger `n` only
    adds to them. Raises ValueError for a negative `n` or `seed`.
    """
    if n < 0 or seed < 0:
        raise ValueError(f"n and seed must be 0 or more, got n={n} and seed={seed}")
    draw = _Draw(seed)
    return (_note(draw.one(tuple(_DATA["notes"].values())), draw) for _ in range(n))


def write_corpus(directory: str | os.PathLike[str], n: int, seed: int) -> Path:
    """Writes `n` notes to DIRECTORY/notes.jsonl, a record {"id", "text"} on each line; its path."""
    path = Path(directory) / "notes.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for i, note in enumerate(synthetic_notes(n, seed)):
            file.write(json.dumps({"id": f"synthetic-{seed}-{i}", "text": note}) + "\n")
    return path


class _Draw:
    """Choices from random.Random.random() alone, whose sequence Python promises never to change."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def one(self, options: Sequence[T]) -> T:
        return options[int(self._random() * len(options))]

    def chance(self, share: float) -> bool:
        return self._random() < share

    def number(self, low: float, high: float, decimals: int) -> str:
        scale = 10**decimals
        return f"{self.integer(round(low * scale), round(high * scale)) / scale:.{decimals}f}"

    def choice(self, name: str, fields: Fields) -> str:
        """One of the templates of this name, filled in."""
        return self.one(_DATA["choices"][name]).format(**fields)


def _note(kind: dict[str, Any], draw: _Draw) -> str:
    diagnosis = draw.one(DIAGNOSES)
    fields = _case(diagnosis, draw)
    for step in kind["steps"]:
        make = _STEPS.get(step)
        fields[step] = make(diagnosis, fields, draw) if make else draw.choice(step, fields)
    return kind["text"].format(**fields)


def _capital(text: str) -> str:
    # str.capitalize() would write "mr" for "MR".
    return text[0].upper() + text[1:]


def _case(diagnosis: Diagnosis, draw: _Draw) -> Fields:
    """Everything that the sentences of one note must agree on."""
    sex = diagnosis.sex or draw.one(("female", "male"))
    female = sex == "female"
    first_name, surname = draw.one(_DATA["first_names"][sex]), draw.one(_DATA["surnames"])
    age = draw.integer(24, 91)
    illness, past_drug = draw.one(BACKGROUND)
    allergen, reaction = draw.one(_DATA["allergies"])
    person = "woman" if female else "man"
    drugs = diagnosis.drugs
    return {
        "sex": sex,
        "first_name": first_name,
        "surname": surname,
        "patient": f"{'Ms.' if female else 'Mr.'} {surname}",
        "age": age,
        "person": person,
        "aged": f"{'an' if 80 <= age < 90 else 'a'} {age}-year-old {person}",
        **(
            {"she": "she", "She": "She", "her": "her", "Her": "Her"}
            if female
            else {"she": "he", "She": "He", "her": "his", "Her": "His"}
        ),
        "diagnosis": diagnosis.name,
        "service": diagnosis.service,
        "physician": PHYSICIANS[diagnosis.service],
        **{f"symptom_{i}": symptom for i, symptom in enumerate(diagnosis.symptoms, start=1)},
        "sign": diagnosis.sign,
        "study": diagnosis.study,
        "finding": diagnosis.finding,
        "Finding": _capital(diagnosis.finding),
        "lab": diagnosis.lab,
        "lab_unit": diagnosis.lab_unit,
        **{f"drug_{i}": str(drug) for i, drug in enumerate(drugs, start=1)},
        **{f"name_{i}": drug.name for i, drug in enumerate(drugs, start=1)},
        "weeks": "1 week" if diagnosis.weeks == 1 else f"{diagnosis.weeks} weeks",
        "later": diagnosis.weeks + 4,
        "illness": illness,
        "past_drug": str(past_drug),
        "past_name": past_drug.name,
        "allergen": allergen,
        "reaction": reaction,
        "ward": draw.one(_DATA["wards"]),
        "days": draw.integer(2, 9),
        "lab_value": draw.number(*diagnosis.lab_range),
        "temperature": draw.number(*((38.1, 39.8, 1) if diagnosis.fever else (36.3, 37.2, 1))),
        "pulse": draw.integer(*((92, 124) if diagnosis.fever else (58, 90))),
    }


# The steps that are more than one choice among templates


def _opening(diagnosis: Diagnosis, fields: Fields, draw: _Draw) -> str:
    who = "{patient} is {aged}".format(**fields)
    one, two, three = diagnosis.symptoms
    if draw.chance(0.3):
        return f"{who} with {diagnosis.name}. {fields['She']} has {one} and {two}."
    came = draw.choice("came", fields)
    return f"{who} who {came} {one}, {two} and {three} for {draw.integer(2, 14)} days."


def _denial(diagnosis: Diagnosis, fields: Fields, draw: _Draw) -> str:
    """Symptoms of another diagnosis, which this patient does not have."""
    index = DIAGNOSES.index(diagnosis) + draw.integer(1, len(DIAGNOSES) - 1)
    other = DIAGNOSES[index % len(DIAGNOSES)]
    absent = [s for s in other.symptoms if s not in diagnosis.symptoms][:2]
    return f"{fields['She']} denies {' and '.join(absent)}."


def _history(diagnosis: Diagnosis, fields: Fields, draw: _Draw) -> str:
    past = "{Her} past history includes {illness}, treated with {past_drug}."
    if draw.chance(0.5):
        past += " {She} is allergic to {allergen}, which causes {reaction}."
    if draw.chance(0.4):
        past += " {She} works as a " + draw.one(_DATA["work"]) + "."
    return past.format(**fields)


def _examination(diagnosis: Diagnosis, fields: Fields, draw: _Draw) -> str:
    pressure = f"{draw.integer(104, 158)}/{draw.integer(58, 92)}"
    degree = "febrile" if diagnosis.fever else "afebrile"
    return (
        f"{fields['She']} was {degree} at {fields['temperature']} degrees, with a pulse of "
        f"{fields['pulse']} and a blood pressure of {pressure}. Examination showed "
        f"{diagnosis.sign}."
    )


def _result(diagnosis: Diagnosis, fields: Fields, draw: _Draw) -> str:
    showed = draw.choice("showed", fields)
    return (
        f"The {diagnosis.lab} was {fields['lab_value']} {diagnosis.lab_unit}. "
        f"The {diagnosis.study} {showed} {diagnosis.finding}."
    )


def _treatment(diagnosis: Diagnosis, fields: Fields, draw: _Draw) -> str:
    first, second = map(str, diagnosis.drugs)
    if draw.chance(0.3):
        first, second = second, first
    added = draw.choice("added", fields)
    return f"{_capital(first)} was started for {diagnosis.name}. {_capital(second)} {added}."


def _follow_up(diagnosis: Diagnosis, fields: Fields, draw: _Draw) -> str:
    who = draw.choice("who", fields)
    return draw.choice("returns", fields | {"who": who})


def _months(diagnosis: Diagnosis, fields: Fields, draw: _Draw) -> int:
    return draw.integer(2, 11)


_STEPS: dict[str, Callable[[Diagnosis, Fields, _Draw], Any]] = {
    "opening": _opening,
    "denial": _denial,
    "history": _history,
    "examination": _examination,
    "result": _result,
    "treatment": _treatment,
    "follow_up": _follow_up,
    "months": _months,
}
