"""What a run needs before its first step: workdir, corpora, tokenizer, model, starting weights.

All that can be refused is refused here, with one line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.checkpoint.files import copy_tokenizer, write_text
from modernbert_jax.checkpoint.orbax import is_orbax, load_orbax
from modernbert_jax.checkpoint.params import flatten
from modernbert_jax.tokenizer import AutoTokenizer

from ..common.hosts import is_first
from ..common.optimizer import StableAdamWState
from ..common.sharding import place
from ..common.workdir import committed, is_remote, start_folder
from ..corpora.build.bpe import train_bpe
from ..corpora.build.prepare import prepare, prepare_text, read_texts
from ..corpora.sources import find
from ..corpora.synthetic import write_corpus
from ..tokens.store import is_store
from .config import TrainConfig
from .data import Masking
from .step import Trainer, TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Say = Callable[[str], None]

# What may differ when a run is taken up again. Where it runs and how a step is cut up changes no
# example and no loss beyond rounding (and the draws of dropout, by micro-batch).
_FREE = {
    "workdir", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "fill_mask",
    "mesh", "hosts", "gradient_accumulation_steps", "scan_layers", "remat", "loss_chunk", "attention",
    "stall_minutes", "profile_step", "profile_steps", "wandb",
}  # fmt: skip


def open_workdir(config: TrainConfig, say: Say) -> Any:
    """Makes the workdir and refuses one that cannot be written or belongs to another run.

    A local path, or one of a bucket (gs://...).
    """
    remote = is_remote(config.workdir)
    workdir: Any = epath.Path(config.workdir) if remote else pathlib.Path(config.workdir).absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"workdir {workdir}: cannot be written ({error.strerror or error}); choose another "
            "--workdir"
        ) from None
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    record = workdir / "run.json"
    if record.exists():
        found = json.loads(record.read_text())
        for name in sorted((set(wanted) | set(found)) - _FREE):
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"workdir {workdir} belongs to a run with another configuration: {name} "
                    f"{_brief(found.get(name), wanted.get(name))}; choose another --workdir, or "
                    "give the old value to go on"
                )
        for name in ("mesh", "gradient_accumulation_steps"):
            if wanted[name] != found.get(name):
                say(f"{name}: {_brief(found.get(name), wanted[name])}")
    elif committed(workdir):
        raise ValueError(
            f"workdir {workdir}: checkpoints without run.json; choose another --workdir"
        )
    if is_first():
        write_text(record, json.dumps(wanted, indent=2) + "\n")
    return workdir


def _brief(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted(set(found) | set(wanted)):
            if found.get(name) != wanted.get(name):
                return f"{name} {_brief(found.get(name), wanted.get(name))}"
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, (old, new) in enumerate(zip(found, wanted, strict=True)):
            if old != new:
                return f"{index} {_brief(old, new)}"
    return f"was {json.dumps(found)}, is {json.dumps(wanted)}"


def with_corpora(config: TrainConfig, workdir: Any, say: Say) -> TrainConfig:
    """Fills in each phase's corpora, making the synthetic one where none is named."""
    default = config.corpus
    if not default and not all(phase.corpus for phase in config.phases):
        if not config.synthetic_notes:
            names = ", ".join(phase.name for phase in config.phases if not phase.corpus)
            raise ValueError(
                f"corpus: expected one for each phase, got none for {names}; pass --corpus, or "
                "--phases.0.corpus and so on"
            )
        folder = pathlib.Path(workdir) / "synthetic"
        if not (folder / "done").exists():
            say(f"writing {config.synthetic_notes:,} synthetic clinical notes")
            write_corpus(folder, config.synthetic_notes, config.seed)
            (folder / "done").write_text("")
        default = (str(folder),)
    phases = tuple(dataclasses.replace(p, corpus=p.corpus or default) for p in config.phases)
    for corpus in dict.fromkeys(corpus for phase in phases for corpus in phase.corpus):
        if not os.path.exists(corpus):
            raise FileNotFoundError(
                f"corpus {corpus}: expected a folder or file of .txt, .jsonl, .csv or .tsv, a "
                "token folder or an MDS folder, found none"
            )
        if is_remote(workdir) and not is_store(corpus):
            raise ValueError(
                f"corpus {corpus}: a workdir in a bucket needs a corpus of tokens; run "
                "`python -m train prepare` and give its folder"
            )
    return dataclasses.replace(config, phases=phases)


def corpus_folder(workdir: Any, corpus: str) -> pathlib.Path:
    """Where `prepare` puts a corpus of text. Its name changes with the corpus's files."""
    path = pathlib.Path(corpus)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(os.fspath(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    digest = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    return workdir / "tokens" / f"{path.name or 'corpus'}-{digest[:12]}"


def prepare_corpus(config: TrainConfig, workdir: Any, corpus: str, say: Say) -> pathlib.Path:
    """Prepares a corpus of text with the run's tokenizer, as `python -m train prepare` does."""
    out = corpus_folder(workdir, corpus)
    summary = prepare(
        source=corpus,
        tokenizer=os.fspath(workdir / "tokenizer"),
        out=os.fspath(out),
        sequence_length=config.sequence_length,
        eval_fraction=config.eval_fraction,
        text_column=config.text_column,
        workers=1,  # a run may be started by a script that processes must not import again
    )
    say(summary)
    return out


def run_tokenizer(config: TrainConfig, workdir: Any, say: Say) -> PreTrainedTokenizerFast:
    """The run's tokenizer, kept in WORKDIR/tokenizer."""
    folder = workdir / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        if config.tokenizer or config.init_from:
            tokenizer = AutoTokenizer.from_pretrained(
                config.tokenizer or start_folder(config.init_from)
            )
        else:
            say(f"training a byte-level BPE of at most {config.model.vocab_size:,} tokens")
            corpora = [c for c in config.phases[0].corpus if not is_store(c)]
            if not corpora:
                raise ValueError(
                    "tokenizer: a corpus of tokens needs the one it was made with; pass --tokenizer"
                )
            source = find("text", config.text_column)
            folders = [corpus_folder(workdir, corpus) for corpus in corpora]
            for corpus, out in zip(corpora, folders, strict=True):
                prepare_text(source, corpus, out, config.eval_fraction)
            texts = (text for out in folders for text in read_texts(out, "train"))
            tokenizer = train_bpe(texts, config.model.vocab_size)
        with tempfile.TemporaryDirectory() as made:
            tokenizer.save_pretrained(made)
            folder.mkdir(parents=True, exist_ok=True)
            copy_tokenizer(made, folder)
    with tempfile.TemporaryDirectory() as here:  # the workdir may be in a bucket
        copy_tokenizer(folder, pathlib.Path(here))
        tokenizer = AutoTokenizer.from_pretrained(here)
    for name in ("cls", "sep", "pad", "mask"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ValueError(
                f"tokenizer {config.tokenizer}: expected a {name} token, found none; use a "
                "tokenizer with ModernBERT's special tokens"
            )
    return tokenizer


def run_model_config(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> ModernBertConfig:
    """The model that is trained: init_from's architecture, the run's dtypes and dropout."""
    model = config.model
    if config.init_from:
        start = ModernBertConfig.from_json(start_folder(config.init_from) / "config.json")
        same = ("dtype", "param_dtype", "residual_dtype", "attention_out_dropout")
        model = start.replace(**{name: getattr(model, name) for name in same})
        if config.global_rope_theta:
            model = model.replace(global_rope_theta=config.global_rope_theta)
        if config.sequence_length > model.max_position_embeddings:
            raise ValueError(
                f"sequence_length {config.sequence_length} exceeds the {model.max_position_embeddings} "
                f"positions of {config.init_from}; lower --sequence-length"
            )
    if len(tokenizer) > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model's vocab_size is "
            f"{model.vocab_size:,}; pass --model.vocab-size {-(-len(tokenizer) // 64) * 64} or "
            "another --tokenizer"
        )
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }
    return model.replace(**ids)


def masking_of(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, rate: float) -> Masking:
    """What is masked at this rate."""
    mask_id: Any = tokenizer.mask_token_id
    assert mask_id is not None  # _tokenizer refused the others
    return Masking(
        rate=rate,
        mask_id=mask_id,
        vocab_size=len(tokenizer),
        special_ids=tuple(sorted(tokenizer.all_special_ids)),
        mask_special=config.mask_special_tokens,
    )


def start_state(config: TrainConfig, trainer: Trainer) -> TrainState:
    """The state at step 0: init_from's weights (and moments, when asked), or new ones."""
    if not config.init_from:
        return trainer.fresh()
    folder = start_folder(config.init_from)
    model_config, shapes = trainer.model_config, trainer.shapes
    where = trainer.shardings.params
    # Read on the host: a device may hold no more than its part.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = ModernBertForMaskedLM.from_pretrained(
            folder, dtype=model_config.dtype, param_dtype=model_config.param_dtype
        )
        values = {path: np.asarray(value) for path, value in flatten(model).items()}
    params = place(values.__getitem__, shapes, where)
    zeros = jax.jit(trainer.tx.init, out_shardings=trainer.shardings.optimizer)(params)
    if not config.init_optimizer:
        return TrainState(params, zeros)  # type: ignore[arg-type]
    if not is_orbax(folder):
        raise ValueError(
            f"init_from {config.init_from}: init_optimizer needs an Orbax checkpoint; convert "
            "with `python -m convert from-composer ... --optimizer`"
        )
    saved = load_orbax(folder, optimizer=True, shardings=where)["optimizer"]
    step = jax.device_put(np.int32(saved["step"]), trainer.replicated)
    moments = ({k: saved[name][k].astype(np.float32) for k in shapes} for name in ("mu", "nu"))
    return TrainState(params, StableAdamWState(step, *moments))
