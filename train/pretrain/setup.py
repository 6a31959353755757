"""What a run needs before its first step: workdir, tokenizer, model and starting weights.

Everything that can be refused is refused here, with one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from modernbert_jax import ModernBertConfig, ModernBertForMaskedLM
from modernbert_jax.attention import IMPLEMENTATIONS, KERNELS, check, passes
from modernbert_jax.checkpoint.files import (
    copy_tokenizer,
    read_config,
    remove_tree,
    write_text,
)
from modernbert_jax.checkpoint.orbax import is_orbax, load_orbax
from modernbert_jax.checkpoint.params import variables
from modernbert_jax.checkpoint.surgery import padded
from modernbert_jax.tokenizer import UNUSED, AutoTokenizer, absent_ids, vocab_size

from ..common.hosts import agree, is_first, log, total
from ..common.optimizer import StableAdamWState
from ..common.records import read_object
from ..common.sharding import place
from ..common.workdir import committed, is_remote, start_folder
from .config import TrainConfig
from .corpora import check_corpora, train_tokenizer, with_corpora
from .extend import check_flags, derived_record
from .masking import Masking
from .step import Trainer, TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What may change when a run is resumed: where it runs and how a step is split changes no example
# and, apart from rounding, no loss.
_FREE = {
    "workdir", "log_every", "eval_every", "checkpoint_every", "checkpoint_minutes",
    "keep_checkpoints", "fill_mask", "mesh", "round_batch", "hosts", "gradient_accumulation_steps",
    "scan_layers", "remat", "loss_chunk", "attention", "fused_local_layers", "stall_minutes",
    "profile_step", "profile_steps", "wandb", "extend", "derived",
}  # fmt: skip
_ADDED = ("lora_rank", "lora_alpha", "lora_targets")
# What a start that got no further than its data leaves in a workdir.
_DERIVED = ("tokenizer", "tokens", "synthetic")


def open_workdir(config: TrainConfig) -> Any:
    """Creates the workdir, a local path or one in a bucket (gs://...), and returns it.

    Writes nothing that outlives the call but the folder. Raises OSError if it cannot be written,
    ValueError if it holds checkpoints of another configuration.
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
    return workdir


def prepare(config: TrainConfig, workdir: Any) -> PreTrainedTokenizerFast:
    """Returns the run's tokenizer, made by the first call for a workdir, which begins run.json.

    Raises ValueError or FileNotFoundError, before anything is written, if the workdir has
    checkpoints of another configuration or a corpus does not exist.
    """
    previous = _previous(config, workdir)
    check_corpora(config)
    if is_first():
        _record(config, workdir, previous)
    tokenizer = _tokenizer(with_corpora(config, workdir), workdir)
    for number, sentence in enumerate(config.fill_mask, start=1):
        if str(tokenizer.mask_token) not in sentence:
            raise ValueError(
                f"fill_mask: expected {tokenizer.mask_token} in each sentence, sentence {number} "
                "has none"
            )
    return tokenizer


def _as_json(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _previous(config: TrainConfig, workdir: Any) -> dict[str, Any] | None:
    """Returns run.json of an earlier start; None without one.

    Raises ValueError if it is another configuration whose checkpoints would be resumed.
    """
    record = workdir / "run.json"
    if config.extend and not (record.exists() and committed(workdir)):
        raise ValueError(
            f"extend: expected a workdir with run.json and checkpoints, {workdir} has none; leave "
            "--extend out to begin a run"
        )
    if not record.exists():
        if committed(workdir):
            log(f"workdir {workdir}: no run.json; its run is resumed with the flags as given")
        return None
    found = read_object(record, remedy="delete it and pass the flags that the run had")
    if prng := found.pop("prng", None):
        log(
            f"prng: the run began with {prng}, an option that is gone; dropout draws other "
            "random numbers from here on"
        )
    if isinstance(found.get("mesh"), dict):
        found["mesh"].setdefault("sequence", 1)  # the record of an older run
    wanted = _as_json(config)
    # Fields that the version which began the run did not have.
    found = {k: v for k, v in _as_json(TrainConfig()).items() if k in _ADDED} | found
    if committed(workdir):
        budget = {"epochs", "phases"}
        for name in _changed(found, wanted):
            if config.extend and name in budget:
                continue
            remedy = ", or --extend for a larger budget or further phases" if name in budget else ""
            raise ValueError(
                f"workdir {workdir} belongs to a run with another configuration: {name} "
                f"{_difference(found.get(name), wanted.get(name))}; choose another --workdir, "
                f"or pass the old value to resume{remedy}"
            )
        if config.extend:
            check_flags(found, wanted)
        for name in ("mesh", "gradient_accumulation_steps"):
            if wanted[name] != found.get(name):
                log(f"{name}: {_difference(found.get(name), wanted[name])}")
    return found


def _changed(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns the names of the fields that differ and may not when a run is resumed."""
    names = sorted((set(wanted) | set(found)) - _FREE)
    return [name for name in names if wanted.get(name) != found.get(name)]


def _record(config: TrainConfig, workdir: Any, previous: dict[str, Any] | None) -> None:
    """Writes run.json unless the run has checkpoints, whose run.json `write_record` replaces.

    A workdir without a checkpoint starts anew if its flags have changed.
    """
    wanted = _as_json(config)
    if committed(workdir) and previous is not None:
        return
    if not committed(workdir) and (changed := _changed(previous or {}, wanted)):
        if previous is not None:
            log(
                f"workdir {workdir}: no checkpoint yet, so that the run starts anew with other "
                f"flags ({', '.join(changed)})"
            )
        for name in _DERIVED:
            if (workdir / name).exists():
                remove_tree(workdir / name)
    write_text(workdir / "run.json", json.dumps(wanted, indent=2) + "\n")


def read_record(workdir: Any) -> dict[str, Any] | None:
    """Returns run.json of a run with checkpoints and derived numbers; None without one."""
    record = read_object(workdir / "run.json") if committed(workdir) else {}
    return record if "derived" in record else None


def write_record(workdir: Any, given: TrainConfig, config: TrainConfig) -> None:
    """Writes run.json: the flags, and what was derived from them."""
    record = _as_json(given) | {"derived": derived_record(config)}
    write_text(workdir / "run.json", json.dumps(record, indent=2) + "\n")


def settle_attention(
    config: TrainConfig, model_config: ModernBertConfig, mesh: Mesh, workdir: Any
) -> TrainConfig:
    """Checks the kernels on this kind of device and returns the config with the run's choice.

    All processes make the same one. WORKDIR/attention.json keeps it for each kind of device, and a
    resumed run keeps to it; config.attention overrides both. Raises ValueError if the kernel that a
    resumed run used has failed its check since.
    """
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    checks: dict[str, Any] = {
        "dtype": model_config.dtype, "head_dim": model_config.head_dim,
        "everywhere": lambda passed: bool(total([passed])[0] == jax.process_count()),
    }  # fmt: skip
    record = workdir / "attention.json"
    found = read_object(record, remedy="delete it; implementations are then chosen again")
    before, name = found.get(device.device_kind), config.attention
    if before not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"{record}: expected one of {', '.join(IMPLEMENTATIONS)}, got {before!r}")
    if not name:
        name = check(device, log=log, **checks).name
        if before not in (None, name):
            if before in KERNELS and not passes(before, device, **checks):
                raise ValueError(
                    f"attention: this run used {before} on {device.device_kind}, which fails its "
                    f"check there now; --attention {name} continues with another implementation"
                )
            config = dataclasses.replace(config, attention=before)
            log(f"attention: {before}, as before; --attention {name} would change it")
            name = before
    elif before not in (None, name):
        log(f"attention: was {before}, is {name}")
    agree({"the implementation of attention": name})
    if is_first():
        write_text(record, json.dumps(found | {device.device_kind: name}) + "\n")
    return config


def _difference(found: Any, wanted: Any) -> str:
    """Returns the first difference in words: "phases 0 tokens was 100, is 200"."""
    pairs: Any = ()
    if isinstance(found, dict) and isinstance(wanted, dict):
        pairs = ((k, found.get(k), wanted.get(k)) for k in sorted(set(found) | set(wanted)))
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = zip(range(len(found)), found, wanted, strict=True)
    for name, old, new in pairs:
        if old != new:
            return f"{name} {_difference(old, new)}"
    return f"was {json.dumps(found)}, is {json.dumps(wanted)}"


def _tokenizer(config: TrainConfig, workdir: Any) -> PreTrainedTokenizerFast:
    """Returns the run's tokenizer, kept in WORKDIR/tokenizer."""
    folder = workdir / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        if config.tokenizer or config.init_from:
            tokenizer = AutoTokenizer.from_pretrained(_tokenizer_source(config))
        else:
            tokenizer = train_tokenizer(config, workdir)
        with tempfile.TemporaryDirectory() as made:
            tokenizer.save_pretrained(made)
            folder.mkdir(parents=True, exist_ok=True)
            copy_tokenizer(made, folder)
    with tempfile.TemporaryDirectory() as local:  # the workdir may be in a bucket
        copy_tokenizer(folder, pathlib.Path(local))
        try:
            tokenizer = AutoTokenizer.from_pretrained(local)
        except ValueError:
            raise ValueError(
                f"{folder}: expected the run's tokenizer, its files are damaged; copy those of a "
                "folder in checkpoints/ over them"
            ) from None
    for name in ("cls", "sep", "pad", "mask"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ValueError(
                f"tokenizer {config.tokenizer}: expected a {name} token, found none; use a "
                "tokenizer with ModernBERT's special tokens"
            )
    return tokenizer


# Fields of the model that hold for a run although its weights come from a checkpoint.
_OF_THE_RUN = (
    "dtype", "param_dtype", "residual_dtype", "embedding_dropout", "attention_dropout",
    "attention_out_dropout", "mlp_dropout",
)  # fmt: skip
# Those that change how far a checkpoint sees, for context extension.
_CONTEXT = ("global_rope_theta", "local_rope_theta", "max_position_embeddings")


def model_config_of(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, model_flags: Collection[str] = ()
) -> ModernBertConfig:
    """Returns the model that is trained: init_from's architecture, the run's dtypes and dropout.

    Its vocabulary is larger than init_from's if the tokenizer is init_from's with added tokens.
    model_flags: the fields of config.model that were set by hand. Raises ValueError for one that
    the checkpoint decides otherwise, and for a tokenizer with ids that the model does not have.
    """
    model = config.model
    if config.init_from:
        start = ModernBertConfig.from_json(start_folder(config.init_from) / "config.json")
        for name in model_flags:
            ours, theirs = getattr(model, name), getattr(start, name)
            if name not in (*_OF_THE_RUN, *_CONTEXT) and ours != theirs:
                flag = f"--model.{name.replace('_', '-')}"
                raise ValueError(
                    f"{flag}: the checkpoint {config.init_from} has {theirs}, got {ours}; leave "
                    f"{flag} out, or train a new model without --init-from"
                )
        taken = {*_OF_THE_RUN, *set(_CONTEXT).intersection(model_flags)}
        model = start.replace(**{name: getattr(model, name) for name in taken})
        if config.global_rope_theta:
            model = model.replace(global_rope_theta=config.global_rope_theta)
        if config.sequence_length > model.max_position_embeddings:
            raise ValueError(
                f"sequence_length {config.sequence_length} exceeds the "
                f"{model.max_position_embeddings} positions of {config.init_from}; lower "
                "--sequence-length"
            )
    if (size := vocab_size(tokenizer)) > model.vocab_size:
        rounded = padded(size, 64)
        if not config.init_from:
            raise ValueError(
                f"the tokenizer has {size:,} ids, the model's vocab_size is "
                f"{model.vocab_size:,}; pass --model.vocab-size {rounded} or another --tokenizer"
            )
        _check_added(tokenizer, config.init_from)
        if config.lora_rank is not None:
            raise ValueError(
                f"lora_rank: expected the vocabulary of {config.init_from}, got a tokenizer with "
                "added tokens, whose embeddings adapters would not train; leave --lora-rank out"
            )
        model = model.replace(vocab_size=rounded)
    return model.replace(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        cls_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
    )


def _check_added(tokenizer: PreTrainedTokenizerFast, init_from: str) -> None:
    """Raises ValueError unless a tokenizer is that of init_from with added tokens.

    Those may have the ids of unused slots, so the slots' names are not compared.
    """
    old, new = {}, tokenizer.get_vocab()
    with contextlib.suppress(FileNotFoundError):  # raised if the checkpoint has no tokenizer
        old = AutoTokenizer.from_pretrained(start_folder(init_from)).get_vocab()
    same = all(new.get(token) == i for token, i in old.items() if not UNUSED.fullmatch(token))
    if not old or not same:
        raise ValueError(
            f"the tokenizer has {vocab_size(tokenizer):,} ids, more than the checkpoint "
            f"{init_from}; expected the checkpoint's own tokenizer with added tokens "
            "(modernbert_jax.tokenizer.add_tokens), pass that as --tokenizer or leave it out"
        )


def _tokenizer_source(config: TrainConfig) -> Any:
    """Returns --tokenizer, or else the folder of --init-from.

    Raises FileNotFoundError if the checkpoint has none.
    """
    if config.tokenizer:
        return config.tokenizer
    assert config.init_from  # else a tokenizer is trained
    folder = start_folder(config.init_from)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(
            f"init_from {config.init_from}: expected a tokenizer.json beside the weights, found "
            "none; pass --tokenizer answerdotai/ModernBERT-base, or the folder of the checkpoint's "
            "own tokenizer"
        )
    return folder


def within_positions(config: TrainConfig) -> TrainConfig:
    """Returns the configuration with sequences that the checkpoint's positions allow.

    Only with fit_to_corpus; tokens per step stay the same.
    """
    if not (config.fit_to_corpus and config.init_from):
        return config
    start = ModernBertConfig.from_json(start_folder(config.init_from) / "config.json")
    length = min(config.sequence_length, start.max_position_embeddings)
    sequences = config.global_batch_size * config.sequence_length // length
    return dataclasses.replace(config, sequence_length=length, global_batch_size=sequences)


def masking_of(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, rate: float) -> Masking:
    """Returns what is masked, at this rate."""
    mask_id: Any = tokenizer.mask_token_id
    assert mask_id is not None  # _tokenizer has refused the others
    return Masking(
        rate=rate,
        mask_id=mask_id,
        vocab_size=vocab_size(tokenizer),
        absent_ids=absent_ids(tokenizer),
        special_ids=tuple(sorted(tokenizer.all_special_ids)),
        mask_special=config.mask_special_tokens,
    )


def start_state(config: TrainConfig, trainer: Trainer) -> TrainState:
    """Returns the state at step 0: init_from's weights (and moments), or random weights."""
    if not config.init_from:
        return trainer.fresh()
    folder = start_folder(config.init_from)
    model_config, shapes = trainer.model_config, trainer.shapes
    shardings = trainer.shardings.params
    # Read on the host: a device may have room only for its part.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = ModernBertForMaskedLM.from_pretrained(
            folder, dtype=model_config.dtype, param_dtype=model_config.param_dtype
        )
        if model_config.vocab_size > model.config.vocab_size:
            log(
                f"vocabulary: {model.config.vocab_size:,} rows in the checkpoint, "
                f"{model_config.vocab_size:,} now; added rows start from the mean of all"
            )
            model.resize_token_embeddings(model_config.vocab_size, None)
        trainer.add_adapters(model)
        values = {path: np.asarray(v.get_value()) for path, v in variables(model).items()}
    params = place(values.__getitem__, shapes, shardings)
    init = jax.jit(trainer.tx.init, out_shardings=trainer.shardings.optimizer)
    zeros = init(trainer.of_trained(params))
    if not config.init_optimizer:
        return TrainState(params, zeros)  # type: ignore[arg-type]
    if not is_orbax(folder):
        raise ValueError(
            f"init_from {config.init_from}: init_optimizer needs an Orbax checkpoint; convert "
            "with `python -m convert from-composer ... --optimizer`"
        )
    grown = model_config.vocab_size > read_config(folder)[0].vocab_size
    # Read straight to the devices, unless the shapes are still those of the smaller vocabulary.
    saved = load_orbax(folder, optimizer=True, shardings=None if grown else shardings)["optimizer"]
    step = jax.device_put(np.int32(saved["step"]), trainer.replicated)
    if grown:
        wide = {k: jax.ShapeDtypeStruct(leaf.shape, np.float32) for k, leaf in shapes.items()}
        mu, nu = (
            place(lambda k, m=saved[name]: _padded_with_zeros(m[k], wide[k].shape), wide, shardings)
            for name in ("mu", "nu")
        )
    else:
        mu, nu = ({k: saved[name][k].astype(np.float32) for k in shapes} for name in ("mu", "nu"))
    return TrainState(params, StableAdamWState(step, mu, nu))


def _padded_with_zeros(moment: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the moment of a parameter that has grown; a new row has seen no gradient."""
    return np.pad(moment, [(0, new - old) for old, new in zip(moment.shape, shape, strict=True)])
