"""ACI-BENCH: simulated visits to a doctor, as transcripts and the notes written from them.

Layout: `data/challenge_data/{train,valid,clinicalnlp_taskB_test1,clinicalnlp_taskC_test2,
clef_taskC_test3}.csv` with dataset, encounter_id, dialogue, note: 67 + 20 + 40 + 40 + 40 rows,
newlines in quoted fields. `*_metadata.csv`, JSON twins and `src_experiment_data` are not read.

A document is a note: 207 notes of 632 tokens make the 0.1M of the model card; with the dialogues it
would be 0.45M. DIALOGUE is a separate source of the transcripts, with turns marked [doctor] and
[patient].
"""

import dataclasses

from ..readers.formats import table
from ..source import Source

SOURCE = Source(
    name="aci_bench",
    title="ACI-BENCH",
    homepage="https://github.com/wyim/aci-bench",
    access="open",
    license="CC BY 4.0",
    citation="Yim et al., ACI-BENCH: a novel ambient clinical intelligence dataset for "
    "benchmarking automatic visit note generation, Scientific Data, 2023",
    files=tuple(
        f"challenge_data/{split}.csv"
        for split in (
            "train",
            "valid",
            "clinicalnlp_taskB_test1",
            "clinicalnlp_taskC_test2",
            "clef_taskC_test3",
        )
    ),
    read=table("note", encounter="encounter_id"),
    documents=207,
    tokens=100_000,
)
DIALOGUE = dataclasses.replace(
    SOURCE,
    name="aci_bench_dialogue",
    title="ACI-BENCH, transcripts",
    read=table("dialogue", encounter="encounter_id"),
    tokens=0,
)
