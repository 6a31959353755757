"""Clinical notes made up by a seeded generator, to try a training run without any real text.

Each note is about one invented patient and one diagnosis. The diagnosis decides the symptoms, the
findings, the laboratory test, the drugs with their doses, the clinic and the time to follow-up, so
that a masked word can mostly be known from the rest of its note. Plausible medicine, and no more.
"""

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# The corpus decides each [MASK]: a title has its sex, a drug its schedule, a physician one service.
FILL_MASK_SENTENCES = (
    "Ms. Hartley is a 63-year-old [MASK] who was seen for exertional dyspnea, orthopnea and "
    "leg swelling for 3 days.",
    "Furosemide 40 mg twice [MASK] was started for heart failure.",
    "The finding was told to Dr. Okafor of [MASK].",
)
FILL_MASK_ANSWERS = ("woman", "daily", "cardiology")


@dataclass(frozen=True)
class Drug:
    name: str
    dose: str
    schedule: str

    def __str__(self) -> str:
        return f"{self.name} {self.dose} {self.schedule}"


@dataclass(frozen=True)
class Diagnosis:
    name: str
    service: str
    symptoms: tuple[str, str, str]
    sign: str
    study: str
    finding: str
    lab: str
    lab_range: tuple[float, float, int]  # lowest, highest, decimals
    lab_unit: str
    drugs: tuple[Drug, Drug]
    weeks: int
    fever: bool = False
    sex: str = ""  # "" is either


# The physician of a service is always the same one.
PHYSICIANS = {
    "cardiology": "Okafor",
    "pulmonology": "Lindqvist",
    "endocrinology": "Moreau",
    "gastroenterology": "Castellanos",
    "surgery": "Whitfield",
    "nephrology": "Banerjee",
    "urology": "Kowalczyk",
    "hematology": "Adeyemi",
    "neurology": "Vasquez",
    "rheumatology": "Fairbanks",
    "dermatology": "Nakamura",
    "infectious disease": "Eriksen",
    "oncology": "Rosenthal",
    "psychiatry": "Delacroix",
}


def _diagnosis(
    name: str,
    service: str,
    symptoms: tuple[str, str, str],
    sign: str,
    imaging: tuple[str, str],
    lab: tuple[str, float, float, int, str],
    first: tuple[str, str, str],
    second: tuple[str, str, str],
    weeks: int,
    fever: bool = False,
    sex: str = "",
) -> Diagnosis:
    test, low, high, decimals, unit = lab
    return Diagnosis(
        name,
        service,
        symptoms,
        sign,
        *imaging,
        test,
        (low, high, decimals),
        unit,
        (Drug(*first), Drug(*second)),
        weeks,
        fever,
        sex,
    )


DIAGNOSES = (
    _diagnosis(
        "community-acquired pneumonia",
        "pulmonology",
        ("productive cough", "fever", "pleuritic chest pain"),
        "crackles at the right base",
        ("chest radiograph", "consolidation in the right lower lobe"),
        ("white cell count", 13, 19, 1, "thousand per microliter"),
        ("ceftriaxone", "1 g", "intravenously daily"),
        ("azithromycin", "500 mg", "daily"),
        6,
        fever=True,
    ),
    _diagnosis(
        "heart failure",
        "cardiology",
        ("exertional dyspnea", "orthopnea", "leg swelling"),
        "an elevated jugular venous pressure and pitting edema",
        ("echocardiogram", "a left ventricular ejection fraction of 30 percent"),
        ("natriuretic peptide", 800, 2400, 0, "pg/mL"),
        ("furosemide", "40 mg", "twice daily"),
        ("carvedilol", "6.25 mg", "twice daily"),
        2,
    ),
    _diagnosis(
        "atrial fibrillation",
        "cardiology",
        ("palpitations", "lightheadedness", "fatigue"),
        "an irregularly irregular pulse",
        ("electrocardiogram", "absent P waves with a rapid ventricular response"),
        ("magnesium", 1.4, 1.7, 1, "mg/dL"),
        ("apixaban", "5 mg", "twice daily"),
        ("metoprolol", "25 mg", "twice daily"),
        4,
    ),
    _diagnosis(
        "acute myocardial infarction",
        "cardiology",
        ("crushing chest pain", "sweating", "nausea"),
        "a fourth heart sound",
        ("coronary angiogram", "occlusion of the left anterior descending artery"),
        ("troponin", 2, 15, 1, "ng/mL"),
        ("aspirin", "81 mg", "daily"),
        ("atorvastatin", "80 mg", "nightly"),
        1,
    ),
    _diagnosis(
        "essential hypertension",
        "cardiology",
        ("morning headache", "blurred vision", "nosebleeds"),
        "arteriovenous nicking on fundoscopy",
        ("electrocardiogram", "voltage criteria for left ventricular hypertrophy"),
        ("potassium", 3.9, 4.6, 1, "mmol/L"),
        ("amlodipine", "5 mg", "daily"),
        ("chlorthalidone", "12.5 mg", "daily"),
        8,
    ),
    _diagnosis(
        "infective endocarditis",
        "infectious disease",
        ("night sweats", "fever", "weight loss"),
        "splinter hemorrhages and a new regurgitant murmur",
        ("transesophageal echocardiogram", "a vegetation on the mitral valve"),
        ("erythrocyte sedimentation rate", 60, 110, 0, "mm/h"),
        ("vancomycin", "1.25 g", "intravenously twice daily"),
        ("gentamicin", "80 mg", "intravenously three times daily"),
        1,
        fever=True,
    ),
    _diagnosis(
        "pulmonary embolism",
        "pulmonology",
        ("sudden dyspnea", "hemoptysis", "calf pain"),
        "a loud second heart sound",
        ("CT pulmonary angiogram", "a filling defect in the right main pulmonary artery"),
        ("D-dimer", 1800, 6200, 0, "ng/mL"),
        ("rivaroxaban", "15 mg", "twice daily"),
        ("acetaminophen", "650 mg", "as needed"),
        3,
    ),
    _diagnosis(
        "chronic obstructive pulmonary disease",
        "pulmonology",
        ("chronic cough", "wheezing", "purulent sputum"),
        "a prolonged expiratory phase",
        ("chest radiograph", "hyperinflated lungs with flattened diaphragms"),
        ("arterial carbon dioxide", 48, 62, 0, "mmHg"),
        ("prednisone", "40 mg", "daily"),
        ("tiotropium", "18 mcg", "inhaled daily"),
        4,
    ),
    _diagnosis(
        "asthma",
        "pulmonology",
        ("episodic wheezing", "chest tightness", "nocturnal cough"),
        "diffuse expiratory wheezes",
        ("chest radiograph", "clear lungs with mild bronchial wall thickening"),
        ("eosinophil count", 450, 900, 0, "per microliter"),
        ("fluticasone", "110 mcg", "inhaled twice daily"),
        ("montelukast", "10 mg", "nightly"),
        8,
    ),
    _diagnosis(
        "pulmonary tuberculosis",
        "infectious disease",
        ("chronic cough", "hemoptysis", "night sweats"),
        "amphoric breath sounds at the left apex",
        ("chest radiograph", "a cavity in the left upper lobe"),
        ("C-reactive protein", 40, 95, 0, "mg/L"),
        ("isoniazid", "300 mg", "daily"),
        ("rifampin", "600 mg", "daily"),
        2,
        fever=True,
    ),
    _diagnosis(
        "non-small cell lung cancer",
        "oncology",
        ("weight loss", "hemoptysis", "hoarseness"),
        "clubbing of the fingers",
        ("CT of the chest", "a spiculated mass in the right upper lobe"),
        ("calcium", 10.8, 12.4, 1, "mg/dL"),
        ("pembrolizumab", "200 mg", "intravenously every three weeks"),
        ("ondansetron", "8 mg", "as needed"),
        3,
    ),
    _diagnosis(
        "type 2 diabetes mellitus",
        "endocrinology",
        ("polyuria", "excessive thirst", "blurred vision"),
        "reduced sensation to monofilament testing",
        ("retinal photograph", "scattered microaneurysms in both eyes"),
        ("hemoglobin A1c", 8.1, 11.6, 1, "percent"),
        ("metformin", "500 mg", "twice daily"),
        ("empagliflozin", "10 mg", "daily"),
        12,
    ),
    _diagnosis(
        "hypothyroidism",
        "endocrinology",
        ("fatigue", "cold intolerance", "constipation"),
        "delayed relaxation of the ankle reflexes",
        ("thyroid ultrasound", "a small heterogeneous gland"),
        ("thyrotropin", 12, 48, 1, "mIU/L"),
        ("levothyroxine", "75 mcg", "daily"),
        ("docusate", "100 mg", "twice daily"),
        6,
    ),
    _diagnosis(
        "Graves disease",
        "endocrinology",
        ("heat intolerance", "tremor", "weight loss"),
        "proptosis and a diffuse goiter",
        ("thyroid uptake scan", "diffusely increased uptake"),
        ("free thyroxine", 3.2, 6.9, 1, "ng/dL"),
        ("methimazole", "10 mg", "daily"),
        ("propranolol", "20 mg", "three times daily"),
        5,
    ),
    _diagnosis(
        "osteoporosis",
        "endocrinology",
        ("back pain", "loss of height", "stooped posture"),
        "thoracic kyphosis",
        ("bone density scan", "a T score of minus 3.1 at the lumbar spine"),
        ("vitamin D", 12, 19, 0, "ng/mL"),
        ("alendronate", "70 mg", "weekly"),
        ("cholecalciferol", "1000 units", "daily"),
        24,
    ),
    _diagnosis(
        "acute appendicitis",
        "surgery",
        ("right lower quadrant pain", "anorexia", "vomiting"),
        "rebound tenderness at the McBurney point",
        ("CT of the abdomen", "a dilated appendix with fat stranding"),
        ("neutrophil count", 10, 16, 1, "thousand per microliter"),
        ("cefoxitin", "2 g", "intravenously before incision"),
        ("ibuprofen", "400 mg", "three times daily"),
        2,
        fever=True,
    ),
    _diagnosis(
        "acute cholecystitis",
        "surgery",
        ("right upper quadrant pain", "vomiting", "fever"),
        "a positive Murphy sign",
        ("abdominal ultrasound", "gallstones with a thickened gallbladder wall"),
        ("alkaline phosphatase", 160, 290, 0, "U/L"),
        ("piperacillin-tazobactam", "4.5 g", "intravenously three times daily"),
        ("ketorolac", "15 mg", "as needed"),
        2,
        fever=True,
    ),
    _diagnosis(
        "acute pancreatitis",
        "gastroenterology",
        ("epigastric pain", "vomiting", "abdominal bloating"),
        "epigastric guarding",
        ("CT of the abdomen", "an edematous pancreas with peripancreatic fluid"),
        ("lipase", 900, 3800, 0, "U/L"),
        ("hydromorphone", "0.5 mg", "intravenously as needed"),
        ("metoclopramide", "10 mg", "three times daily"),
        3,
    ),
    _diagnosis(
        "duodenal ulcer",
        "gastroenterology",
        ("burning epigastric pain", "melena", "early satiety"),
        "epigastric tenderness and pale conjunctivae",
        ("upper endoscopy", "a clean-based ulcer in the duodenal bulb"),
        ("hemoglobin", 7.4, 9.8, 1, "g/dL"),
        ("pantoprazole", "40 mg", "twice daily"),
        ("sucralfate", "1 g", "four times daily"),
        8,
    ),
    _diagnosis(
        "Crohn disease",
        "gastroenterology",
        ("chronic diarrhea", "cramping abdominal pain", "weight loss"),
        "a tender mass in the right iliac fossa",
        ("MR enterography", "thickening of the terminal ileum"),
        ("fecal calprotectin", 420, 1500, 0, "mcg/g"),
        ("budesonide", "9 mg", "daily"),
        ("azathioprine", "100 mg", "daily"),
        6,
    ),
    _diagnosis(
        "ulcerative colitis",
        "gastroenterology",
        ("bloody diarrhea", "urgency", "tenesmus"),
        "tenderness over the left colon",
        ("colonoscopy", "continuous inflammation from the rectum to the splenic flexure"),
        ("albumin", 2.6, 3.2, 1, "g/dL"),
        ("mesalamine", "2.4 g", "daily"),
        ("prednisolone", "30 mg", "daily"),
        4,
    ),
    _diagnosis(
        "cirrhosis",
        "gastroenterology",
        ("abdominal distension", "easy bruising", "confusion"),
        "shifting dullness and spider angiomas",
        ("abdominal ultrasound", "a nodular liver with ascites"),
        ("bilirubin", 2.8, 7.5, 1, "mg/dL"),
        ("spironolactone", "100 mg", "daily"),
        ("lactulose", "20 g", "three times daily"),
        3,
    ),
    _diagnosis(
        "acute pyelonephritis",
        "nephrology",
        ("flank pain", "fever", "dysuria"),
        "costovertebral angle tenderness",
        ("renal ultrasound", "an enlarged left kidney without hydronephrosis"),
        ("urine white cell count", 50, 200, 0, "per high-power field"),
        ("ciprofloxacin", "500 mg", "twice daily"),
        ("phenazopyridine", "200 mg", "three times daily"),
        2,
        fever=True,
    ),
    _diagnosis(
        "nephrolithiasis",
        "urology",
        ("colicky flank pain", "hematuria", "nausea"),
        "restlessness without peritoneal signs",
        ("CT of the kidneys", "a 6 mm stone in the distal left ureter"),
        ("urine red cell count", 30, 120, 0, "per high-power field"),
        ("tamsulosin", "0.4 mg", "nightly"),
        ("naproxen", "500 mg", "twice daily"),
        4,
    ),
    _diagnosis(
        "chronic kidney disease",
        "nephrology",
        ("fatigue", "itching", "foamy urine"),
        "ankle edema and pallor",
        ("renal ultrasound", "small echogenic kidneys"),
        ("creatinine", 2.1, 4.8, 1, "mg/dL"),
        ("losartan", "50 mg", "daily"),
        ("sevelamer", "800 mg", "three times daily"),
        12,
    ),
    _diagnosis(
        "prostate cancer",
        "urology",
        ("weak urinary stream", "nocturia", "pelvic pain"),
        "a hard nodule of the left prostatic lobe",
        ("MR of the prostate", "a lesion in the left peripheral zone"),
        ("prostate-specific antigen", 11, 46, 1, "ng/mL"),
        ("leuprolide", "22.5 mg", "every three months"),
        ("bicalutamide", "50 mg", "daily"),
        12,
        sex="male",
    ),
    _diagnosis(
        "breast cancer",
        "oncology",
        ("painless breast lump", "nipple retraction", "axillary fullness"),
        "a firm irregular mass of the left breast",
        ("mammogram", "an irregular density in the upper outer quadrant"),
        ("carcinoma antigen 15-3", 34, 88, 0, "U/mL"),
        ("letrozole", "2.5 mg", "daily"),
        ("palbociclib", "125 mg", "daily"),
        4,
        sex="female",
    ),
    _diagnosis(
        "iron deficiency anemia",
        "hematology",
        ("fatigue", "craving for ice", "brittle nails"),
        "conjunctival pallor and spoon nails",
        ("capsule endoscopy", "angiodysplasia of the jejunum"),
        ("ferritin", 3, 11, 0, "ng/mL"),
        ("ferrous sulfate", "325 mg", "daily"),
        ("ascorbic acid", "250 mg", "daily"),
        8,
    ),
    _diagnosis(
        "deep vein thrombosis",
        "hematology",
        ("calf pain", "unilateral leg swelling", "warmth of the leg"),
        "a swollen left calf with tenderness",
        ("venous duplex ultrasound", "a noncompressible left popliteal vein"),
        ("fibrinogen", 420, 610, 0, "mg/dL"),
        ("enoxaparin", "80 mg", "subcutaneously twice daily"),
        ("warfarin", "5 mg", "nightly"),
        1,
    ),
    _diagnosis(
        "ischemic stroke",
        "neurology",
        ("right arm weakness", "slurred speech", "facial droop"),
        "a right pronator drift",
        ("MR of the brain", "restricted diffusion in the left middle cerebral territory"),
        ("low-density lipoprotein", 131, 190, 0, "mg/dL"),
        ("clopidogrel", "75 mg", "daily"),
        ("rosuvastatin", "20 mg", "nightly"),
        3,
    ),
    _diagnosis(
        "migraine",
        "neurology",
        ("throbbing headache", "photophobia", "visual aura"),
        "no focal neurological deficit",
        ("CT of the head", "no acute intracranial abnormality"),
        ("sodium", 137, 142, 0, "mmol/L"),
        ("sumatriptan", "50 mg", "as needed"),
        ("topiramate", "25 mg", "nightly"),
        8,
    ),
    _diagnosis(
        "epilepsy",
        "neurology",
        ("witnessed convulsions", "tongue biting", "postictal confusion"),
        "a healing laceration of the tongue",
        ("electroencephalogram", "sharp waves over the left temporal region"),
        ("lactate", 3.5, 7.2, 1, "mmol/L"),
        ("levetiracetam", "500 mg", "twice daily"),
        ("lamotrigine", "25 mg", "daily"),
        6,
    ),
    _diagnosis(
        "Parkinson disease",
        "neurology",
        ("resting tremor", "slowness of movement", "shuffling gait"),
        "cogwheel rigidity of the right wrist",
        ("dopamine transporter scan", "reduced uptake in the left putamen"),
        ("ceruloplasmin", 22, 34, 0, "mg/dL"),
        ("carbidopa-levodopa", "25/100 mg", "three times daily"),
        ("ropinirole", "0.25 mg", "three times daily"),
        12,
    ),
    _diagnosis(
        "multiple sclerosis",
        "neurology",
        ("painful loss of vision", "limb numbness", "urinary urgency"),
        "an afferent pupillary defect",
        ("MR of the spine", "an enhancing lesion at the third cervical level"),
        ("oligoclonal band count", 4, 9, 0, "in the cerebrospinal fluid"),
        ("methylprednisolone", "1000 mg", "intravenously daily"),
        ("baclofen", "10 mg", "three times daily"),
        6,
    ),
    _diagnosis(
        "bacterial meningitis",
        "infectious disease",
        ("severe headache", "fever", "neck stiffness"),
        "a positive Kernig sign",
        ("CT of the head", "no mass effect before lumbar puncture"),
        ("cerebrospinal fluid protein", 150, 420, 0, "mg/dL"),
        ("dexamethasone", "10 mg", "intravenously four times daily"),
        ("ampicillin", "2 g", "intravenously every four hours"),
        2,
        fever=True,
    ),
    _diagnosis(
        "rheumatoid arthritis",
        "rheumatology",
        ("morning stiffness", "swollen hands", "wrist pain"),
        "synovitis of the metacarpophalangeal joints",
        ("hand radiograph", "marginal erosions of both hands"),
        ("rheumatoid factor", 60, 210, 0, "IU/mL"),
        ("methotrexate", "15 mg", "weekly"),
        ("folic acid", "1 mg", "daily"),
        8,
    ),
    _diagnosis(
        "gout",
        "rheumatology",
        ("sudden toe pain", "joint redness", "joint swelling"),
        "a red and tender first metatarsophalangeal joint",
        ("foot radiograph", "punched-out erosions of the great toe"),
        ("uric acid", 8.4, 11.2, 1, "mg/dL"),
        ("allopurinol", "100 mg", "daily"),
        ("colchicine", "0.6 mg", "twice daily"),
        4,
    ),
    _diagnosis(
        "cellulitis",
        "infectious disease",
        ("spreading redness", "leg warmth", "fever"),
        "a well-demarcated tender erythema of the right shin",
        ("soft tissue ultrasound", "cobblestoning without an abscess"),
        ("procalcitonin", 0.6, 2.4, 1, "ng/mL"),
        ("cephalexin", "500 mg", "four times daily"),
        ("clotrimazole", "1 percent", "topically twice daily"),
        1,
        fever=True,
    ),
    _diagnosis(
        "plaque psoriasis",
        "dermatology",
        ("scaly plaques", "itching", "nail pitting"),
        "silvery plaques on both elbows",
        ("skin biopsy", "acanthosis with parakeratosis"),
        ("triglyceride level", 160, 260, 0, "mg/dL"),
        ("clobetasol", "0.05 percent", "topically twice daily"),
        ("calcipotriene", "0.005 percent", "topically daily"),
        12,
    ),
    _diagnosis(
        "major depressive disorder",
        "psychiatry",
        ("low mood", "early waking", "loss of interest"),
        "psychomotor slowing",
        ("MR of the brain", "no structural abnormality"),
        ("vitamin B12", 310, 620, 0, "pg/mL"),
        ("sertraline", "50 mg", "daily"),
        ("trazodone", "50 mg", "nightly"),
        6,
    ),
)

# Earlier illness and its lasting drug.
BACKGROUND = (
    ("hyperlipidemia", Drug("simvastatin", "20 mg", "nightly")),
    ("gastroesophageal reflux", Drug("omeprazole", "20 mg", "daily")),
    ("restless legs", Drug("pramipexole", "0.125 mg", "nightly")),
    ("benign positional vertigo", Drug("meclizine", "25 mg", "as needed")),
    ("chronic low back pain", Drug("gabapentin", "300 mg", "three times daily")),
    ("insomnia", Drug("melatonin", "3 mg", "nightly")),
    ("allergic rhinitis", Drug("cetirizine", "10 mg", "daily")),
    ("glaucoma", Drug("latanoprost", "one drop", "nightly")),
)
ALLERGIES = (
    ("penicillin", "a rash"),
    ("sulfa drugs", "hives"),
    ("codeine", "vomiting"),
    ("latex", "contact dermatitis"),
    ("shellfish", "lip swelling"),
    ("iodinated contrast", "wheezing"),
)
WORK = ("teacher", "farmer", "nurse", "carpenter", "driver", "librarian", "cook", "electrician")
FIRST_NAMES = {
    "female": ("Ada", "Beatrice", "Carmen", "Dolores", "Esther", "Farah", "Greta", "Hanna")
    + ("Irene", "Joan", "Keiko", "Lucia", "Miriam", "Nadia", "Olga", "Priya"),
    "male": ("Albert", "Boris", "Cedric", "Dmitri", "Edgar", "Felix", "Gilbert", "Hassan")
    + ("Ivan", "Jorge", "Kenji", "Leon", "Marcus", "Nigel", "Omar", "Pavel"),
}
SURNAMES = (
    ("Abbott", "Barros", "Calloway", "Dembele", "Ellison", "Fontaine", "Grabowski", "Hartley")
    + ("Ibarra", "Jansen", "Kettering", "Lozano", "Mbeki", "Novak", "Oduya", "Pemberton")
    + ("Quigley", "Rahman", "Stavros", "Thornbury", "Uchida", "Valdez", "Winslow", "Xiong")
    + ("Yardley", "Zielinski", "Ashdown", "Brannigan", "Cartwright", "Dunmore", "Eastman", "Falk")
)
WARDS = ("Maple", "Cedar", "Birch", "Willow", "Juniper", "Aspen")


def synthetic_notes(n: int, seed: int) -> Iterator[str]:
    """`n` notes of 60 to 400 words, 140 on average.

    The same seed gives the same notes on every machine and Python version, and a larger `n` only
    adds to them. Raises ValueError for a negative `n` or `seed`.
    """
    if n < 0 or seed < 0:
        raise ValueError(f"n and seed must be 0 or more, got n={n} and seed={seed}")
    draw = _Draw(seed)
    kinds = (_discharge_summary, _radiology_report, _progress_note, _clinic_letter)
    return (draw.one(kinds)(_case(draw), draw) for _ in range(n))


def write_corpus(directory: str | os.PathLike[str], n: int, seed: int) -> Path:
    """Write `n` notes to notes.jsonl in `directory`, a record {"id", "text"} a line; its path."""
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


@dataclass(frozen=True)
class _Patient:
    first_name: str
    surname: str
    female: bool
    age: int

    @property
    def title(self) -> str:
        return "Ms." if self.female else "Mr."

    @property
    def person(self) -> str:
        return "woman" if self.female else "man"

    @property
    def she(self) -> str:
        return "she" if self.female else "he"

    @property
    def her(self) -> str:
        return "her" if self.female else "his"

    @property
    def aged(self) -> str:
        return f"{'an' if 80 <= self.age < 90 else 'a'} {self.age}-year-old {self.person}"

    @property
    def mention(self) -> str:
        return f"{self.title} {self.surname}"


@dataclass(frozen=True)
class _Case:
    """What one note is about: everything that its sentences must agree on."""

    patient: _Patient
    diagnosis: Diagnosis
    history: tuple[str, Drug]
    allergy: tuple[str, str]
    ward: str
    days: int
    lab_value: str
    temperature: str
    pulse: int

    @property
    def physician(self) -> str:
        return PHYSICIANS[self.diagnosis.service]


def _capital(text: str) -> str:
    # str.capitalize() would write "mr" for "MR".
    return text[0].upper() + text[1:]


def _case(draw: _Draw) -> _Case:
    diagnosis = draw.one(DIAGNOSES)
    sex = diagnosis.sex or draw.one(("female", "male"))
    patient = _Patient(
        draw.one(FIRST_NAMES[sex]), draw.one(SURNAMES), sex == "female", draw.integer(24, 91)
    )
    return _Case(
        patient,
        diagnosis,
        draw.one(BACKGROUND),
        draw.one(ALLERGIES),
        draw.one(WARDS),
        draw.integer(2, 9),
        draw.number(*diagnosis.lab_range),
        draw.number(38.1, 39.8, 1) if diagnosis.fever else draw.number(36.3, 37.2, 1),
        draw.integer(92, 124) if diagnosis.fever else draw.integer(58, 90),
    )


# Sentences that several kinds of note share


def _opening(case: _Case, draw: _Draw) -> str:
    patient, diagnosis = case.patient, case.diagnosis
    who = f"{patient.mention} is {patient.aged}"
    one, two, three = diagnosis.symptoms
    if draw.chance(0.3):
        return f"{who} with {diagnosis.name}. {patient.she.capitalize()} has {one} and {two}."
    verb = draw.one(("presented with", "came in with", "was seen for"))
    days = draw.integer(2, 14)
    return f"{who} who {verb} {one}, {two} and {three} for {days} days."


def _denial(case: _Case, draw: _Draw) -> str:
    """Symptoms of another diagnosis, which this patient does not have."""
    index = DIAGNOSES.index(case.diagnosis) + draw.integer(1, len(DIAGNOSES) - 1)
    other = DIAGNOSES[index % len(DIAGNOSES)]
    absent = [s for s in other.symptoms if s not in case.diagnosis.symptoms][:2]
    return f"{case.patient.she.capitalize()} denies {' and '.join(absent)}."


def _background(case: _Case, draw: _Draw) -> str:
    illness, drug = case.history
    allergen, reaction = case.allergy
    patient = case.patient
    past = f"{patient.her.capitalize()} past history includes {illness}, treated with {drug}."
    if draw.chance(0.5):
        past += f" {patient.she.capitalize()} is allergic to {allergen}, which causes {reaction}."
    if draw.chance(0.4):
        past += f" {patient.she.capitalize()} works as a {draw.one(WORK)}."
    return past


def _examination(case: _Case, draw: _Draw) -> str:
    patient = case.patient
    pressure = f"{draw.integer(104, 158)}/{draw.integer(58, 92)}"
    degree = "febrile" if case.diagnosis.fever else "afebrile"
    return (
        f"{patient.she.capitalize()} was {degree} at {case.temperature} degrees, with a pulse of "
        f"{case.pulse} and a blood pressure of {pressure}. "
        f"Examination showed {case.diagnosis.sign}."
    )


def _result(case: _Case, draw: _Draw) -> str:
    diagnosis = case.diagnosis
    lab = f"The {diagnosis.lab} was {case.lab_value} {diagnosis.lab_unit}."
    verb = draw.one(("showed", "revealed", "demonstrated"))
    return f"{lab} The {diagnosis.study} {verb} {diagnosis.finding}."


def _treatment(case: _Case, draw: _Draw) -> str:
    first, second = case.diagnosis.drugs
    if draw.chance(0.3):
        first, second = second, first
    verb = draw.one(("was added", "was given as well", "was continued"))
    return (
        f"{_capital(str(first))} was started for {case.diagnosis.name}. "
        f"{_capital(str(second))} {verb}."
    )


def _follow_up(case: _Case, draw: _Draw) -> str:
    diagnosis, patient = case.diagnosis, case.patient
    weeks = "1 week" if diagnosis.weeks == 1 else f"{diagnosis.weeks} weeks"
    who = draw.one((patient.mention, "The patient", patient.she.capitalize()))
    return draw.one(
        (
            f"{who} will be seen in the {diagnosis.service} clinic in {weeks} "
            f"by Dr. {case.physician}.",
            f"{who} will return to the {diagnosis.service} clinic in {weeks}, "
            f"and Dr. {case.physician} will repeat the {diagnosis.lab}.",
        )
    )


def _medicines(case: _Case) -> str:
    drugs = *case.diagnosis.drugs, case.history[1]
    return "\n".join(f"{i}. {drug}" for i, drug in enumerate(drugs, start=1))


# Kinds of note


def _discharge_summary(case: _Case, draw: _Draw) -> str:
    patient, diagnosis = case.patient, case.diagnosis
    course = draw.one(
        (
            f"{patient.she.capitalize()} improved, and the {diagnosis.symptoms[0]} "
            f"settled by day {case.days}.",
            f"By day {case.days} {patient.her} {diagnosis.symptoms[0]} had resolved.",
            f"The {diagnosis.symptoms[1]} settled first, then the {diagnosis.symptoms[0]}, and "
            f"{patient.she} felt well by day {case.days}.",
        )
    )
    advice = draw.one(
        (
            f"{patient.mention} was told to come back in case of {diagnosis.symptoms[0]}.",
            f"{patient.her.capitalize()} family was taught to watch for {diagnosis.symptoms[1]}.",
        )
    )
    return "\n\n".join(
        (
            f"DISCHARGE SUMMARY\nPatient: {patient.first_name} {patient.surname}\n"
            f"Age: {patient.age}\nSex: {'female' if patient.female else 'male'}\n"
            f"Service: {diagnosis.service}\nWard: {case.ward}\n"
            f"Attending: Dr. {case.physician}\nDiagnosis: {diagnosis.name}",
            f"History: {_opening(case, draw)} {_denial(case, draw)} {_background(case, draw)}",
            f"Examination: {_examination(case, draw)}",
            f"Results: {_result(case, draw)}",
            f"Hospital course: {patient.mention} was admitted to the {case.ward} ward with "
            f"{diagnosis.name}. {_treatment(case, draw)} {course}",
            f"Discharge medicines:\n{_medicines(case)}",
            f"Plan: {_follow_up(case, draw)} {advice}",
        )
    )


def _radiology_report(case: _Case, draw: _Draw) -> str:
    patient, diagnosis = case.patient, case.diagnosis
    sex = "female" if patient.female else "male"
    quality = draw.one(
        (
            "The study is of good quality and no earlier one is available.",
            f"The study is compared with the one made {draw.integer(2, 11)} months ago.",
            "The study is limited by movement but sufficient for the question.",
        )
    )
    other = draw.one(
        (
            "There is no other acute abnormality.",
            "Nothing else of note is seen.",
            "The remaining structures are normal for age.",
        )
    )
    advice = draw.one(
        (
            f"Correlation with the {diagnosis.lab} is advised.",
            f"Follow-up of the {diagnosis.study} in {diagnosis.weeks + 4} weeks is advised.",
            f"The finding was told to Dr. {case.physician} of {diagnosis.service}.",
        )
    )
    one, two, _ = diagnosis.symptoms
    return "\n\n".join(
        (
            f"DIAGNOSTIC REPORT\nStudy: {diagnosis.study}\n"
            f"Patient: {patient.first_name} {patient.surname}, {patient.age}-year-old {sex}\n"
            f"Requested by: Dr. {case.physician}, {diagnosis.service}",
            f"Indication: {patient.mention} is {patient.aged} with "
            f"{one} and {two}. The question is {diagnosis.name}.",
            f"Technique: {quality}",
            f"Findings: The {diagnosis.study} shows {diagnosis.finding}. {other}",
            f"Impression: {_capital(diagnosis.finding)}, "
            f"{draw.one(('consistent with', 'in keeping with', 'which fits'))} "
            f"{diagnosis.name}. {advice}",
        )
    )


def _progress_note(case: _Case, draw: _Draw) -> str:
    patient, diagnosis = case.patient, case.diagnosis
    first, second = diagnosis.drugs
    night = draw.one(("slept well", "had a quiet night", "slept poorly", "ate a full breakfast"))
    trend = draw.one(("reports less", "still has", "no longer has"))
    plan = draw.one(
        (
            f"Continue {first}. Add {second}.",
            f"Continue {first} and {second}.",
            f"Hold {second.name} today and continue {first}.",
        )
    )
    return "\n\n".join(
        (
            f"PROGRESS NOTE\nHospital day {case.days}, {case.ward} ward, {diagnosis.service}",
            f"Subjective: {patient.mention} {night}. {patient.she.capitalize()} {trend} "
            f"{diagnosis.symptoms[0]}. {_denial(case, draw)}",
            f"Objective: {_examination(case, draw)} {_result(case, draw)}",
            f"Assessment: {patient.age}-year-old {patient.person} with {diagnosis.name}, "
            f"day {case.days}, on {first.name} and {second.name}. "
            f"{patient.her.capitalize()} {case.history[0]} is stable on {case.history[1].name}.",
            f"Plan: {plan} Repeat the {diagnosis.lab} tomorrow. "
            f"Discuss with Dr. {case.physician}. {_follow_up(case, draw)}",
        )
    )


def _clinic_letter(case: _Case, draw: _Draw) -> str:
    patient, diagnosis = case.patient, case.diagnosis
    thanks = draw.one(
        (
            f"Thank you for referring {patient.mention} to the {diagnosis.service} clinic.",
            f"I saw {patient.mention} in the {diagnosis.service} clinic today.",
            f"{patient.mention} was seen in the {diagnosis.service} clinic for {diagnosis.name}.",
            f"The patient was seen in the {diagnosis.service} clinic for {diagnosis.name}.",
        )
    )
    talk = draw.one(
        (
            f"We talked about {diagnosis.name} and its treatment, and {patient.she} agreed.",
            f"{patient.she.capitalize()} had many questions about {diagnosis.name}.",
            f"I explained the side effects of {diagnosis.drugs[0].name} to {patient.mention}.",
        )
    )
    return "\n\n".join(
        (
            f"CLINIC LETTER\nRe: {patient.first_name} {patient.surname}, age {patient.age}\n"
            f"Clinic: {diagnosis.service}",
            "Dear colleague,",
            f"{thanks} {_opening(case, draw)} {_background(case, draw)}",
            f"{_examination(case, draw)} {_result(case, draw)}",
            f"In my view this is {diagnosis.name}. {_treatment(case, draw)} {talk}",
            _follow_up(case, draw),
            f"Yours sincerely,\nDr. {case.physician}, {diagnosis.service}",
        )
    )
