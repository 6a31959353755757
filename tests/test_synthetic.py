"""The synthetic corpus: the same everywhere, consistent within a note, and worth learning."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from train.configs.notebook import get_config
from train.corpora.readers.text import find_files, not_read, read_documents
from train.corpora.synthetic import (
    BACKGROUND,
    DIAGNOSES,
    FILL_MASK_ANSWERS,
    FILL_MASK_SENTENCES,
    PHYSICIANS,
    synthetic_notes,
    write_corpus,
)
from train.pretrain.corpora import with_corpora


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return list(synthetic_notes(3000, 0))


def digest(notes) -> str:
    return hashlib.sha256("\n\n".join(notes).encode()).hexdigest()


def words(note: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", note)


def subject(note: str):
    """The diagnosis that a note is about, by its study: no two share study and finding."""
    found = [d for d in DIAGNOSES if d.finding in note.lower() or d.finding in note]
    assert len(found) == 1, note
    return found[0]


def test_a_seed_gives_the_same_notes_for_ever():
    # A change of this digest changes every run of the demo: make it on purpose.
    assert (
        digest(synthetic_notes(200, 7))
        == "2b635f3009709d168572a7290e859b01b5c734c18e41c91e4eb56b073ccc9af3"
    )


def test_no_hash_order_decides_anything(notes):
    code = (
        "import hashlib; from train.corpora.synthetic import synthetic_notes as s; "
        "print(hashlib.sha256('\\n\\n'.join(s(300, 0)).encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"PYTHONHASHSEED": "1234"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest(notes[:300])


def test_seeds_differ_and_a_larger_corpus_only_adds(notes):
    assert list(synthetic_notes(50, 0)) == notes[:50]
    assert not set(synthetic_notes(500, 1)) & set(notes)
    assert len(set(notes)) == len(notes)
    assert list(synthetic_notes(0, 0)) == []
    for n, seed in ((-1, 0), (1, -1)):
        with pytest.raises(ValueError, match=f"got n={n} and seed={seed}"):
            synthetic_notes(n, seed)


def test_lengths_kinds_and_diagnoses(notes):
    lengths = [len(note.split()) for note in notes]
    assert 60 <= min(lengths) and max(lengths) <= 400
    kinds = Counter(note.split("\n")[0] for note in notes)
    assert set(kinds) == {
        "DISCHARGE SUMMARY",
        "DIAGNOSTIC REPORT",
        "PROGRESS NOTE",
        "CLINIC LETTER",
    }
    assert min(kinds.values()) > 600
    subjects = Counter(subject(note).name for note in notes)
    assert len(subjects) == len(DIAGNOSES) == 40
    assert min(subjects.values()) > 40


def test_one_patient_a_note(notes):
    women = 0
    for note in notes:
        found = words(note)
        female = {"Ms", "woman", "female", "She", "she", "Her", "her"} & set(found)
        male = {"Mr", "man", "male", "He", "he", "His", "his"} & set(found)
        assert bool(female) != bool(male), note
        assert subject(note).sex in ("", "female" if female else "male")
        women += bool(female)
        assert len(set(re.findall(r"M[rs]\. (\w+)", note))) == 1, note
        ages = re.findall(r"(\d+)-year-old", note) + re.findall(r"[Aa]ge:? (\d+)", note)
        assert len(set(ages)) == 1, note
        assert set(re.findall(r"Dr\. (\w+)", note)) == {PHYSICIANS[subject(note).service]}
    # Binomial over 3000: standard deviation 0.01.
    assert 0.45 < women / len(notes) < 0.55


def test_the_diagnosis_decides_the_drugs_and_their_doses(notes):
    known = [drug for d in DIAGNOSES for drug in d.drugs] + [drug for _, drug in BACKGROUND]
    assert len({drug.name for drug in known}) == len(known)
    of_diagnosis = {drug.name for d in DIAGNOSES for drug in d.drugs}
    whole = {drug.name: f"{drug.dose} {drug.schedule}" for drug in known}
    mention = re.compile(rf"\b({'|'.join(map(re.escape, whole))})\b(?: (\d.*))?", re.IGNORECASE)
    seen = 0
    for note in notes:
        own = {drug.name for drug in subject(note).drugs}
        for name, dose in mention.findall(note):
            name = name.lower()
            assert name in own or name not in of_diagnosis, (name, note)
            if dose:
                assert dose.startswith(whole[name]), note
                seen += 1
    assert seen > 5000


def test_prose_is_clean(notes):
    for note in notes:
        assert note.isascii() and note == note.strip()
        assert not re.search(r"  | \.|\.\.|\ba [aeio]\w+-year|\ba 8\d-|\bNone\b|[{}]", note), note


def test_neighbours_tell_much_more_than_frequencies(notes):
    # What a masked LM is measured by, with counting in its place.
    train, held_out = notes[:2700], notes[2700:]
    unigram = Counter(word for note in train for word in words(note)).most_common(1)[0][0]
    between = defaultdict(Counter)
    for note in train:
        found = words(note)
        for before, word, after in zip(found, found[1:], found[2:], strict=False):
            between[before, after][word] += 1
    best = {pair: counts.most_common(1)[0][0] for pair, counts in between.items()}
    total = by_frequency = by_neighbours = 0
    for note in held_out:
        found = words(note)
        for before, word, after in zip(found, found[1:], found[2:], strict=False):
            total += 1
            by_frequency += word == unigram
            by_neighbours += word == best.get((before, after))
    assert by_frequency / total < 0.15
    assert by_neighbours / total > 0.6


def test_the_corpus_decides_the_masked_words(notes):
    patterns = (
        (r"Ms\. \w+ is an? \d+-year-old (\w+)", r"Mr\. \w+ is an? \d+-year-old (\w+)", "man"),
        (r"[Ff]urosemide 40 mg twice (\w+)", r"[Aa]lendronate 70 mg (\w+)", "weekly"),
        (r"told to Dr\. Okafor of (\w+)", r"told to Dr\. Fairbanks of (\w+)", "rheumatology"),
    )
    text = "\n".join(notes)
    assert len(FILL_MASK_SENTENCES) == 3 == len(FILL_MASK_ANSWERS)
    for sentence, answer, pattern in zip(
        FILL_MASK_SENTENCES, FILL_MASK_ANSWERS, patterns, strict=True
    ):
        own, other, different = pattern
        assert sentence.count("[MASK]") == 1
        assert re.search(own, sentence.replace("[MASK]", answer))
        assert set(re.findall(own, text)) == {answer}
        assert len(re.findall(own, text)) >= 5
        assert set(re.findall(other, text)) == {different}


def test_write_corpus_makes_a_folder_that_can_be_read(tmp_path, notes):
    path = write_corpus(tmp_path / "new" / "corpus", 20, 0)
    lines = path.read_bytes().decode("ascii").split("\n")
    assert lines.pop() == ""
    records = [json.loads(line) for line in lines]
    assert [set(record) for record in records] == [{"id", "text"}] * 20
    assert len({record["id"] for record in records}) == 20
    assert [document.text for document in read_documents(path.parent)] == notes[:20]


def test_the_notes_of_a_run_are_the_only_files_in_their_folder(tmp_path):
    """A run warns about files that it cannot read; its own marker must not be one of them."""
    (corpus,) = {
        path
        for phase in with_corpora(replace(get_config(), synthetic_notes=3), tmp_path).phases
        for path in phase.corpus
    }
    assert not_read(Path(corpus), {file.path for file in find_files(corpus)}) == ""
