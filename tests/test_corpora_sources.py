"""The 20 clinical corpora: real files with exact counts, and fixtures in the official layouts.

All text in the fixtures is invented. What is expected is typed here, not made by the readers.
"""

import collections
import csv
import gzip
import json
import re
import traceback
import tracemalloc
from pathlib import Path

import pytest

from train.corpora import sources as corpora
from train.corpora.readers import formats
from train.corpora.source import Example, Report, Source
from train.corpora.sources import aci_bench, brain_mri_stroke, primock57

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# The model card: samples, million tokens.
CARD = {
    "aci_bench": (207, 0.1),
    "ade_corpus": (20_896, 0.5),
    "brain_mri_stroke": (2_603, 0.2),
    "chexpert_plus": (223_460, 60.6),
    "chifir": (283, 0.1),
    "coral": (240, 0.7),
    "eye_gaze_cxr": (892, 0.03),
    "gout": (8_429, 0.2),
    "id68": (78, 0.02),
    "inspect": (22_259, 2.8),
    "mednli": (14_047, 0.5),
    "medqa": (14_366, 2.0),
    "mimic3": (2_021_411, 1_047.7),
    "mimic4_note": (2_631_243, 1_765.7),
    "mtsamples": (2_358, 1.7),
    "negex": (2_056, 0.1),
    "primock57": (57, 0.01),
    "qpain": (51, 0.01),
    "reflacx": (2_543, 0.1),
    "respiratory_interviews": (272, 0.6),
}


def source(name: str) -> Source:
    return corpora.find(name)


def read(chosen: Source, root: Path) -> tuple[list[Example], Report]:
    report = Report()
    examples = [
        example for part in chosen.parts(root) for example in chosen.read(part, root, report)
    ]
    assert len({example.id for example in examples}) == len(examples)
    return examples, report


def texts(name: str, root: Path) -> list[str]:
    return [example.text for example in read(source(name), root)[0]]


def unique(examples: list[Example]) -> int:
    return len({example.text for example in examples})


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def real(folder: str) -> Path:
    if not (DATA / folder).is_dir():
        pytest.skip(f"needs shared/data/{folder}")
    return DATA / folder


def refusal(chosen: Source, root: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(chosen, root)
    assert "secret" not in "".join(traceback.format_exception(error.value))
    assert "\n" not in str(error.value)
    return str(error.value)


def trimmed(text: str) -> str:
    return re.sub(r"[ \t]+(?=\n)", "", text).rstrip()


# What each source says of itself


@pytest.mark.parametrize("name", CARD)
def test_a_source_tells_what_it_is(name):
    chosen = source(name)
    assert (chosen.name, chosen.kind) == (name, "clinical")
    assert (chosen.documents, chosen.tokens) == (CARD[name][0], round(CARD[name][1] * 1e6))
    assert chosen.homepage.startswith("https://")
    assert chosen.title and chosen.license and chosen.citation
    assert bool(chosen.agreement) == (chosen.access != "open")


@pytest.mark.parametrize("name", CARD)
def test_a_missing_source_says_where_it_is_to_be_had(name, tmp_path):
    chosen = source(name)
    message = refusal(chosen, tmp_path)
    assert chosen.homepage in message and chosen.files[0] in message
    assert chosen.agreement in message


def test_parts_are_found_at_any_depth_and_hidden_ones_are_left_out(tmp_path):
    for name in (
        "unpacked/1.4/NOTEEVENTS.csv.gz",
        "__MACOSX/._NOTEEVENTS.csv.gz",
        ".cache/NOTEEVENTS.csv",
        "b/NOTEEVENTS.csv",
        "b/NOTEEVENTS.csv.gz",
        "NOTEEVENTS_old.csv",
    ):
        write(tmp_path / name, "x")
    parts = source("mimic3").parts(tmp_path)
    assert [part.relative_to(tmp_path).as_posix() for part in parts] == [
        "b/NOTEEVENTS.csv",
        "unpacked/1.4/NOTEEVENTS.csv.gz",
    ]


def test_an_archive_is_to_be_unpacked(tmp_path):
    write(tmp_path / "mednli-1.0.0.zip", b"PK")
    assert refusal(source("mednli"), tmp_path).endswith("; unpack mednli-1.0.0.zip first")


# Real files


@pytest.mark.parametrize("split, count", [("train", 67), ("valid", 20)])
@pytest.mark.parametrize("column", ["note", "dialogue"])
def test_aci_bench(split, count, column):
    root = real("aci_bench")
    chosen = aci_bench.SOURCE if column == "note" else aci_bench.DIALOGUE
    examples, report = read(chosen, root)
    assert (len(examples), unique(examples), report.dropped) == (87, 87, {})
    path = f"data/challenge_data/{split}.csv"
    with (root / path).open(newline="") as file:
        expected = {
            f"{path}:{number}": (trimmed(row[column]), row["encounter_id"])
            for number, row in enumerate(csv.DictReader(file), start=1)
        }
    found = {e.id: (e.text, e.meta["encounter"]) for e in examples if e.id.startswith(path)}
    assert len(found) == count and found == expected


def test_respiratory_interviews():
    examples, report = read(source("respiratory_interviews"), real("simulated_resp_interviews"))
    assert (len(examples), unique(examples), report.dropped) == (90, 90, {})
    kinds = collections.Counter(example.meta["specialty"] for example in examples)
    assert kinds == {"RES": 70, "MSK": 15, "GAS": 2, "CAR": 2, "GEN": 1}
    assert not any("\r" in example.text for example in examples)
    # 15 files have lines that do not tell who speaks; they stay.
    without_mark = [
        example.id
        for example in examples
        if re.search(r"^(?!D:|P:)[ \t]*\S", example.text, re.MULTILINE)
    ]
    assert len(without_mark) == 15
    root = DATA / "simulated_resp_interviews"
    for example in examples:
        words = (root / example.id.removesuffix(":1")).read_text("utf-8").split()
        assert example.text.split() == words


def test_negex():
    examples, report = read(source("negex"), real("negex"))
    assert (len(examples), unique(examples), report.dropped) == (2376, 2056, {})
    lines = (DATA / "negex/rsAnnotations-1-120-random.txt").read_text().splitlines()
    assert [example.text for example in examples] == [
        line.split("\t")[2].rstrip() for line in lines[1:] if line
    ]


def test_negex_without_a_header(tmp_path):
    """The form in the repository's genConText: a remark comes second."""
    name = "rsAnnotations-1-120-random.txt"
    _, *rows = (real("negex") / name).read_text().split("\n")
    lines = "\n".join(row.replace("\t", "\tno space\t", 1) for row in rows)
    write(tmp_path / name, lines)
    both = [read(source("negex"), root) for root in (tmp_path, real("negex"))]
    assert both[0][0] == both[1][0] and not both[0][1].dropped


@pytest.mark.parametrize(
    "lines, message",
    [
        ("1\tpain\tsecret\tNegated\n", "line 1: expected 6 or 7 fields between tabs, got 4"),
        ("1\tpain\tsecret\tNegated\tR\tP\n2\ta\tsecret\n", "line 2: expected 6 fields .* got 3"),
        ("1\tpain\tsecret\tDenied\tR\tP\n", "line 1: expected one of affirmed, negated, possible"),
    ],
)
def test_negex_in_another_form(tmp_path, lines, message):
    write(tmp_path / "rsAnnotations-1-120-random.txt", lines)
    assert re.search(message, refusal(source("negex"), tmp_path))


def test_mtsamples():
    examples, report = read(source("mtsamples"), real("mtsamples"))
    assert (len(examples), unique(examples)) == (293, 281)
    assert report.dropped == {"empty text": 4}
    with (DATA / "mtsamples/mtsamples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 297
    kept = [row for row in rows if row["transcription"].strip()]
    assert [example.text for example in examples] == [r["transcription"].rstrip() for r in kept]
    assert [example.meta["specialty"] for example in examples] == [
        row["medical_specialty"].strip() for row in kept
    ]


def test_medqa():
    examples, report = read(source("medqa"), real("medqa"))
    assert (len(examples), unique(examples), report.dropped) == (600, 600, {})
    lines = (DATA / "medqa/data_clean/questions/US/test.jsonl").read_text("utf-8").splitlines()
    for example, line in zip(examples, lines, strict=True):
        record = json.loads(line)
        options = [f"{letter}. {record['options'][letter]}" for letter in "ABCDE"]
        assert example.text.split() == " ".join([record["question"], *options]).split()
        assert re.findall(r"^([A-E])\. ", example.text, re.MULTILINE) == list("ABCDE")


def test_primock57_notes():
    examples, report = read(primock57.SOURCE, real("primock57"))
    assert (len(examples), unique(examples), report.dropped) == (25, 25, {})
    days = collections.Counter(example.meta["consultation"][:4] for example in examples)
    assert days == {"day1": 15, "day2": 10}
    for example in examples:
        record = json.loads((DATA / "primock57" / example.id.removesuffix(":1")).read_text())
        assert example.text == trimmed(record["note"])


def test_primock57_dialogues():
    root = real("primock57")
    examples, report = read(primock57.DIALOGUE, root)
    assert (len(examples), unique(examples), report.dropped) == (25, 25, {})
    for example in examples:
        assert not re.search(r"<|>|\r|[ ]{2}", example.text)
        assert re.fullmatch(r"((Doctor|Patient): \S.*\n?)+", example.text)
        said = {"Doctor": "", "Patient": ""}
        for line in example.text.split("\n"):
            speaker, text = line.split(": ", 1)
            said[speaker] += text + " "
        for speaker, text in said.items():
            name = f"{example.meta['consultation']}_{speaker.lower()}.TextGrid"
            grid = (root / "transcripts" / name).read_text()
            # Another way to the same words: whatever stands in quotes after "text =".
            quoted = " ".join(re.findall(r'text = "((?:[^"]|"")*)"', grid)).replace('""', '"')
            assert re.findall(r"\w+", text) == re.findall(r"\w+", re.sub("<[^>]*>", "", quoted))


# Fixtures in the official layouts


def test_ade_corpus(tmp_path):
    relation = "10030778|A rash (5|6 mm) followed the drug.|rash|2|6|drug|29|33\n"
    write(
        tmp_path / "DRUG-AE.rel",
        relation + relation.replace("rash|2|6", "mm|14|16") + "7|secret|a\n",
    )
    write(tmp_path / "ADE-NEG.txt", "6460590 NEG Nothing  happened NEG today.\n\n12 POS secret\n")
    write(tmp_path / "DRUG-DOSE.rel", "1|Two mg were given.|two|0|3|x|4|5\n")
    examples, report = read(source("ade_corpus"), tmp_path)
    assert [(e.id, e.text, e.meta) for e in examples] == [
        ("ADE-NEG.txt:1", "Nothing  happened NEG today.", {"pmid": "6460590"}),
        ("DRUG-AE.rel:1", "A rash (5|6 mm) followed the drug.", {"pmid": "10030778"}),
        ("DRUG-AE.rel:2", "A rash (5|6 mm) followed the drug.", {"pmid": "10030778"}),
    ]
    assert report.dropped == {"unexpected fields": 2}
    assert report.places == {"unexpected fields": ["ADE-NEG.txt:3", "DRUG-AE.rel:3"]}


def test_brain_mri_stroke(tmp_path):
    path = write(tmp_path / "pone.s001.csv", '﻿AIS,Report\r\n1,"No infarct.\r\nEnd"\r\n0,\r\n')
    examples, report = read(brain_mri_stroke.SOURCE, tmp_path)
    assert [e.text for e in examples] == ["No infarct.\nEnd"]
    assert report.places == {"empty text": ["pone.s001.csv:2"]}

    write(path, "label,conclusion\n1,secret infarct\n")
    message = refusal(brain_mri_stroke.SOURCE, tmp_path)
    assert message.endswith("'label', 'conclusion'; name the text column with --text-column")
    chosen = corpora.find("brain_mri_stroke", "Conclusion")
    assert [e.text for e in read(chosen, tmp_path)[0]] == ["secret infarct"]

    path.unlink()
    write(tmp_path / "reports.tsv.gz", 'x\tnotes\n1\t"a\tb, c"\n')
    assert texts("brain_mri_stroke", tmp_path) == ["a\tb, c"]


CHEXPERT_COLUMNS = (
    "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,patient_report_date_order,"
    "report,section_narrative,section_clinical_history,section_history,section_comparison,"
    "section_technique,section_procedure_comments,section_findings,section_impression,"
    "section_end_of_impression,section_summary,section_accession_number,age,sex,race,ethnicity,"
    "interpreter_needed,insurance_type,recent_bmi,deceased,split"
).split(",")


@pytest.mark.parametrize("index", [False, True])
def test_chexpert_plus(tmp_path, index):
    report_text = 'NARRATIVE: \nTwo views, "PA"\n\nIMPRESSION: \n1. Clear.  \n\n'
    rows = [
        {"frontal_lateral": "Frontal", "report": report_text, "split": "train", "age": "61"},
        {"frontal_lateral": "Lateral", "report": report_text, "split": "train", "age": "61"},
        {"frontal_lateral": "Frontal", "report": "", "split": "valid"},
        {"frontal_lateral": "Frontal", "report": "Clear, again.", "split": "valid"},
    ]
    columns = [""] * index + CHEXPERT_COLUMNS
    with (tmp_path / "df_chexpert_plus_240401.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    examples, report = read(source("chexpert_plus"), tmp_path)
    first = 'NARRATIVE:\nTwo views, "PA"\n\nIMPRESSION:\n1. Clear.'
    assert [e.text for e in examples] == [first, first, "Clear, again."]
    assert unique(examples) == 2
    assert [e.meta for e in examples] == [{"split": s} for s in ("train", "train", "valid")]
    assert report.places == {"empty text": ["df_chexpert_plus_240401.csv:3"]}


def test_chifir(tmp_path):
    root = tmp_path / "corpus-fungal-infections-1.0.2"
    write(root / "chifir_metadata.csv", "patient_id,report_no\n1,1\n12,3\n14,1\n")
    write(root / "reports/pt1_r1.txt", "\ufeffMACRO\r\nHyphae  seen. \r\n\r\n")
    write(root / "reports/pt12_r3.txt", "Größe 3 cm".encode("cp1252"))
    write(root / "reports/pt14_r1.txt", " \r\n")
    write(root / "annotations/pt1_r1.ann", "T1\tFungus 6 12\tHyphae\n")
    write(root / "LICENSE.txt", "a license")
    examples, report = read(source("chifir"), tmp_path)
    folder = "corpus-fungal-infections-1.0.2/reports"
    assert [(e.id, e.text) for e in examples] == [
        (f"{folder}/pt12_r3.txt:1", "Größe 3 cm"),
        (f"{folder}/pt1_r1.txt:1", "MACRO\nHyphae  seen."),
    ]
    assert report.places == {"empty text": [f"{folder}/pt14_r1.txt:1"]}


def test_coral(tmp_path):
    root = tmp_path / "coral"
    write(root / "annotated/breastca/3.txt", "Seen on ***** for [REDACTED].\nStable")
    write(root / "annotated/breastca/3.ann", "T1\tStage 0 4\tSeen\n")
    write(root / "annotated/pdac/0.txt", "Pancreas")
    write(root / "annotated/README.txt", "read me")
    write(root / "unannotated/data/pdac_unannotated.csv", ',coral_idx,note_text\n0,41,"a\n\nb"\n')
    write(root / "unannotated/data/breastca_unannotated.csv", ",coral_idx,note_text\n0,40,c\n")
    assert texts("coral", tmp_path) == [
        "Seen on ***** for [REDACTED].\nStable",
        "Pancreas",
        "c",
        "a\n\nb",
    ]


def test_eye_gaze_cxr(tmp_path):
    folder = tmp_path / "audio_segmentation_transcripts"
    said = {"full_text": "heart is normal ", "time_stamped_text": []}
    write(folder / "aa-01/transcript.json", json.dumps(said))
    write(folder / "bb-02/transcript.json", "\ufeff" + json.dumps(said, indent=2))
    write(folder / "cc-03/transcript.json", '{"full_text": "", "time_stamped_text": []}')
    write(folder / "dd-04/transcript.json", '{"time_stamped_text": [{"phrase": "secret"}]}')
    write(folder / "dd-04/index.html", "<html>")
    examples, report = read(source("eye_gaze_cxr"), tmp_path)
    assert [(e.text, e.meta) for e in examples] == [
        ("heart is normal", {"dicom": "aa-01"}),
        ("heart is normal", {"dicom": "bb-02"}),
    ]
    assert report.dropped == {"empty text": 2}
    write(folder / "ee-05/transcript.json", '{"full_text": "secret')
    assert "ee-05" in refusal(source("eye_gaze_cxr"), tmp_path)


def test_gout(tmp_path):
    header = "Chief Complaint,Predict,Consensus\r\n"
    write(
        tmp_path / "GOUT-CC-2019-CORPUS-REDACTED.csv",
        header + '"pt says ""my gout"" since <<TIME>>, foot",Y,-\r\nChest pain,N,-\r\n',
    )
    write(
        tmp_path / "GOUT-CC-2019-CORPUS-SYNTHETIC.csv",
        header + '"pt says ""my gout"" since 7 am, foot",Y,-\r\nChest pain,N,-\r\n',
    )
    write(tmp_path / "GOUT-CC-2020-CORPUS-REDACTED.csv", header + ",U,U\r\n")
    write(tmp_path / "SHA256SUMS.txt", "0  x")
    examples, report = read(source("gout"), tmp_path)
    assert [e.text for e in examples] == [
        'pt says "my gout" since <<TIME>>, foot',
        "Chest pain",
        'pt says "my gout" since 7 am, foot',
        "Chest pain",
    ]
    assert report.dropped == {"empty text": 1}


def test_id68(tmp_path):
    write(tmp_path / "data/ID-68/corpus/12DG0001", "Seizures from birth.\n")
    write(tmp_path / "data/ID-68/corpus/12DG0002", "Height −3 SD\n")
    write(tmp_path / "data/ID-68/corpus/.DS_Store", b"\0\0")
    write(tmp_path / "data/ID-68/ann/12DG0001", "0\t8\tSeizures\tHP:0001250\n")
    write(tmp_path / "data/GSC+/corpus/100", "of another set")
    expected = ["Seizures from birth.", "Height −3 SD"]
    assert texts("id68", tmp_path) == expected
    assert texts("id68", tmp_path / "data/ID-68") == expected


def test_inspect(tmp_path):
    write(
        tmp_path / "Final_Impressions.csv",
        '\ufeffimpression_id,impressions\n7,"1. No embolism.\n2. Compared with <date>, stable."\n'
        "8, \n9,Unremarkable.\n",
    )
    write(tmp_path / "labels_20250611.tsv", "impression_id\tpe\n7\t0\n")
    examples, report = read(source("inspect"), tmp_path)
    assert [(e.text, e.meta["impression"]) for e in examples] == [
        ("1. No embolism.\n2. Compared with <date>, stable.", "7"),
        ("Unremarkable.", "9"),
    ]
    assert report.dropped == {"empty text": 1}


def test_mednli(tmp_path):
    def line(pair: str, one: str, two: str) -> str:
        record = {"pairID": pair, "gold_label": "neutral", "sentence1": one, "sentence2": two}
        return json.dumps(record | {"sentence1_parse": "(ROOT x)"}) + "\n"

    premise = "He was given oxygen . "
    write(
        tmp_path / "mli_train_v1.jsonl",
        line("a", premise, " He was short of breath.")
        + '{"sentence1": "secret\n'
        + line("b", premise, "He was well.")
        + line("c", premise, "")
        + "[1]\n",
    )
    write(tmp_path / "mli_test_v1.jsonl", line("d", "Na 140", "Sodium is normal."))
    examples, report = read(source("mednli"), tmp_path)
    assert [(e.text, e.meta) for e in examples] == [
        ("Na 140\nSodium is normal.", {"pair": "d"}),
        ("He was given oxygen .\nHe was short of breath.", {"pair": "a"}),
        ("He was given oxygen .\nHe was well.", {"pair": "b"}),
    ]
    assert report.places == {
        "broken JSON": ["mli_train_v1.jsonl:2", "mli_train_v1.jsonl:5"],
        "a sentence is missing": ["mli_train_v1.jsonl:4"],
    }
    write(tmp_path / "mli_dev_v1.jsonl", '"secret"\n{"secret"\n')
    assert "mli_dev_v1.jsonl: expected a JSON object on each line" in refusal(
        source("mednli"), tmp_path
    )


def test_medqa_reads_the_bank_and_not_the_four_options(tmp_path):
    def line(question: str) -> str:
        options = {"B": "Rest", "A": "Heparin ", "C": "\ud800"}
        return json.dumps({"question": question, "options": options, "answer_idx": "A"}) + "\n"

    folder = tmp_path / "data_clean/questions"
    write(folder / "US/US_qbank.jsonl", line("What now?") + line("And then?"))
    write(folder / "US/train.jsonl", line("What now?") + '{"question": "secret"}\n')
    write(folder / "US/4_options/phrases_no_exclude_train.jsonl", line("What now?"))
    write(folder / "Mainland/train.jsonl", line("Anderswo?"))
    examples, report = read(source("medqa"), tmp_path)
    assert [e.text for e in examples] == [
        "What now?\nA. Heparin\nB. Rest\nC. \ufffd",
        "And then?\nA. Heparin\nB. Rest\nC. \ufffd",
        "What now?\nA. Heparin\nB. Rest\nC. \ufffd",
    ]
    assert unique(examples) == 2
    assert report.dropped == {"no question or no options": 1}


MIMIC3 = (
    '"ROW_ID","SUBJECT_ID","HADM_ID","CHARTDATE","CHARTTIME","STORETIME","CATEGORY",'
    '"DESCRIPTION","CGID","ISERROR","TEXT"\n'
    '174,22532,167853,"2151-08-04",,,"Discharge summary","Report",,,"Admission Date:  '
    '[**2151-7-16**]  \n\nHe said ""no pain"".\n  Indented, with a comma\n"\n'
    '175,22532,,"2151-08-04",,,"Nursing ","Report",17,1,"secret, in the wrong chart"\n'
    '176,1,,"2151-08-04",,,"ECG","Report",,,""\n'
    '177,1,,"2151-08-04",,,"ECG","Report",,,"Sinus rhythm","secret"\n'
    '178,1,,"2151-08-04",,,"ECG","Report",,,"Sinus rhythm\r\nNormal"\n'
)
MIMIC3_TEXTS = [
    'Admission Date:  [**2151-7-16**]\n\nHe said "no pain".\n  Indented, with a comma',
    "Sinus rhythm\nNormal",
]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_mimic3(tmp_path, packed):
    write(tmp_path / f"1.4/NOTEEVENTS.csv{packed}", MIMIC3)
    write(tmp_path / f"1.4/PATIENTS.csv{packed}", "ROW_ID,TEXT\n1,x\n")
    examples, report = read(source("mimic3"), tmp_path)
    assert [e.text for e in examples] == MIMIC3_TEXTS
    assert [e.meta for e in examples] == [
        {"row": "174", "category": "Discharge summary"},
        {"row": "178", "category": "ECG"},
    ]
    at = f"1.4/NOTEEVENTS.csv{packed}"
    assert [e.id for e in examples] == [f"{at}:1", f"{at}:5"]
    assert report.places == {
        "marked as an error (ISERROR)": [f"{at}:2"],
        "empty text": [f"{at}:3"],
        "more fields than columns": [f"{at}:4"],
    }


def test_mimic3_broken_files_say_so_and_show_no_text(tmp_path):
    chosen = source("mimic3")
    path = write(tmp_path / "NOTEEVENTS.csv", MIMIC3 + '179,1,,,,,,,,,"secret and no end\n')
    assert "NOTEEVENTS.csv, record 6: a quote is opened and never closed" in refusal(
        chosen, tmp_path
    )
    write(path, MIMIC3.replace("ISERROR", "IS_ERROR"))
    assert "expected a column ISERROR; it has 'ROW_ID', 'SUBJECT_ID'" in refusal(chosen, tmp_path)
    write(path, "1,2,secret\n1,2,secret\n")
    assert "does not look like a header" in refusal(chosen, tmp_path)
    write(path, "")
    assert "expected a column ROW_ID" in refusal(chosen, tmp_path)
    path.unlink()
    whole = gzip.compress(MIMIC3.encode() * 50)
    (tmp_path / "NOTEEVENTS.csv.gz").write_bytes(whole[:-20])
    assert "damaged or incomplete .gz" in refusal(chosen, tmp_path)


def test_mimic4_note(tmp_path):
    header = "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n"
    row = '{0}-{1}-{2},{0},5,{1},{2},2180-05-07 00:00:00,2180-05-09 15:26:00,"{3}"\n'
    text = ' \nName:  ___             Unit No:   ___\n \nHe is ""well"".'
    discharge = row.format(100, "DS", 21, text)
    write(tmp_path / "note/discharge.csv.gz", header + discharge)
    write(tmp_path / "note/radiology.csv.gz", header + row.format(7, "RR", 1, "EXAM:  CT\r\n\r\n"))
    detail = "note_id,subject_id,field_name,field_value,field_ordinal\n7-RR-1,7,exam_name,CT,1\n"
    write(tmp_path / "note/radiology_detail.csv.gz", detail)
    write(tmp_path / "note/discharge_detail.csv.gz", detail)
    examples, _ = read(source("mimic4_note"), tmp_path)
    assert [(e.text, e.meta) for e in examples] == [
        (
            '\nName:  ___             Unit No:   ___\n\nHe is "well".',
            {"note": "100-DS-21", "type": "DS"},
        ),
        ("EXAM:  CT", {"note": "7-RR-1", "type": "RR"}),
    ]


def test_qpain(tmp_path):
    header = "Vignette,Question,Answer,Dosage,Explanation\n"
    write(
        tmp_path / "data_post_op.csv",
        header + '"Patient D, a 40-year-old [race] [gender],\nhas pain.",Give it? ,Yes.,Low.,'
        '"It hurts [possessive] knee."\n' + "Vignette two,Give it?, ,,Never.\n",
    )
    examples, _ = read(source("qpain"), tmp_path)
    assert [(e.text, e.meta) for e in examples] == [
        (
            "Patient D, a 40-year-old [race] [gender],\nhas pain.\nGive it?\nYes.\n"
            "It hurts [possessive] knee.",
            {"context": "post_op"},
        ),
        ("Vignette two\nGive it?\nNever.", {"context": "post_op"}),
    ]


def test_reflacx(tmp_path):
    header = "id,split,eye_tracking_data_discarded,image,dicom_id,subject_id\n"
    folder = tmp_path / "main_data"
    write(
        folder / "metadata_phase_1.csv",
        header + "P102R915798,test,False,a.dcm,x,1\nP102R000001,test,True,b.dcm,y,2\n",
    )
    write(
        folder / "metadata_phase_3.csv",
        header + "P300R000002,train,False,c.dcm,z,3\n../outside,train,False,d.dcm,z,3\n"
        "P300R000003,train,False,e.dcm,z,3\n,train,False,f.dcm,z,3\n",
    )
    write(folder / "P102R915798/transcription.txt", "normal heart size. ")
    write(folder / "P102R915798/timestamps_transcription.csv", "word\nnormal\n")
    write(folder / "P300R000002/transcription.txt", "")
    write(folder / "P300R000003/transcription.txt", b"secret\0\0")
    write(tmp_path / "outside/transcription.txt", "secret")
    write(folder / "transcription.txt", "secret")
    examples, report = read(source("reflacx"), tmp_path)
    assert [(e.id, e.text, e.meta) for e in examples] == [
        ("main_data/metadata_phase_1.csv:1", "normal heart size.", {"case": "P102R915798"})
    ]
    phase3 = "main_data/metadata_phase_3.csv"
    assert report.places == {
        "no transcription": ["main_data/metadata_phase_1.csv:2", f"{phase3}:2", f"{phase3}:4"],
        "empty text": [f"{phase3}:1"],
        "broken transcription": [f"{phase3}:3"],
    }


def test_interviews_in_utf16_and_with_mixed_line_ends(tmp_path):
    folder = tmp_path / "Data/Clean Transcripts"
    talk = "D: Any cough?  \r\n\r\nP: Yes – for 3 days.\n\nI smoke.\r\n"
    expected = "D: Any cough?\n\nP: Yes – for 3 days.\n\nI smoke."
    write(folder / "RES0002.txt", b"\xff\xfe" + talk.encode("utf-16-le"))
    write(folder / "RES0003.txt", talk)
    write(folder / "notes.txt", "not an interview")
    assert texts("respiratory_interviews", tmp_path) == [expected, expected]
    # The folder itself may be named too.
    assert texts("respiratory_interviews", folder) == [expected, expected]


def text_grid(*intervals: tuple[float, float, str]) -> str:
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", "xmax = 9"]
    lines += ["tiers? <exists>", "size = 1", "item []:", "    item [1]:"]
    lines += ['        class = "IntervalTier"', '        name = "x"', "        xmin = 0"]
    lines += ["        xmax = 9", f"        intervals: size = {len(intervals)}"]
    for number, (start, end, text) in enumerate(intervals, start=1):
        lines += [f"        intervals [{number}]:", f"            xmin = {start}"]
        lines += [f"            xmax = {end}", f'            text = "{text}"']
    return "\r\n".join(lines) + "\r\n"


def with_points(grid: str) -> str:
    """The same with a second tier, of one point."""
    tier = """    item [2]:
        class = "TextTier"
        name = "events"
        xmin = 0
        xmax = 9
        points: size = 1
        points [1]:
            number = 5
            mark = "door"
"""
    return grid.replace("size = 1", "size = 2", 1) + tier.replace("\n", "\r\n")


def test_primock57_dialogue_is_in_the_order_of_time_and_without_marks(tmp_path):
    folder = tmp_path / "transcripts"
    doctor = write(
        folder / "day3_consultation01_doctor.TextGrid",
        with_points(
            text_grid((0, 1, ""), (1, 2.5, "Hello, <UNSURE>sir</UNSURE>."), (10, 11, "<UNIN/>."))
        ),
    )
    patient = write(
        folder / "day3_consultation01_patient.TextGrid",
        text_grid(
            (0, 0.5, 'Is that ""it""?'), (9, 10, "<INAUDIBLE_SPEECH/>, No <UNIN/>, no  more.")
        ),
    )
    examples, report = read(primock57.DIALOGUE, tmp_path)
    assert [(e.text, e.meta) for e in examples] == [
        (
            'Patient: Is that "it"?\nDoctor: Hello, sir.\nPatient: No, no more.',
            {"consultation": "day3_consultation01"},
        )
    ]
    write(doctor, "secret, and no TextGrid at all\n")
    assert "expected a Praat TextGrid" in refusal(primock57.DIALOGUE, tmp_path)
    patient.unlink()
    assert read(primock57.DIALOGUE, tmp_path)[1].dropped == {"no transcript of the patient": 1}


# Shared work


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a \t\r\nb\rc", "a\nb\nc"),
        ("  a  b\n\n\n  c \n \n", "  a  b\n\n\n  c"),
        ("a\fb \u00a0\nc", "a\fb \u00a0\nc"),
        (" \r\n\t", ""),
    ],
)
def test_clean(text, expected):
    assert formats.clean(text) == expected


def test_memory_stays_flat_in_the_size_of_a_table(tmp_path):
    row = '1,,,,,,"x","y",,,"' + "The patient rests; pain 3/10.\n" * 100 + '"\n'
    write(tmp_path / "NOTEEVENTS.csv.gz", MIMIC3 + row * 4000)  # 12 MB
    chosen = source("mimic3")
    (part,) = chosen.parts(tmp_path)
    report = Report()
    tracemalloc.start()
    try:
        count = sum(1 for _ in chosen.read(part, tmp_path, report))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 4002
    assert peak < 2_000_000
