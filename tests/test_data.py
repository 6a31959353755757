"""The loader: token folders, MDS folders, and batches that lose and repeat nothing."""

import dataclasses
import hashlib
import json
import pathlib
import pickle
import shutil
import time
from collections import Counter

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from modernbert_jax.packing import IGNORE_INDEX, plan_rows
from train.pretrain.config import Phase, TrainConfig
from train.pretrain.data import Batches, Plans, eval_batches
from train.pretrain.masking import Masking
from train.tokens import store as tokens
from train.tokens.mds import MdsShards
from train.tokens.store import TokenStore, is_store, joined, open_store
from train.tokens.writer import SplitWriter, cut, write_manifest

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "mds"
MASKING = Masking(0.3, 4, 500, (0, 1, 2, 3, 4))


class Memory:
    """Pieces in a list, and which of them were read."""

    def __init__(self, ids):
        self.ids, self.seen = ids, Counter()

    def read(self, pieces):
        self.seen.update(int(p) for p in pieces)
        return [self.ids[p] for p in pieces]


def memory_store(documents=40, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest, documents).astype(np.int32)
    ids = [rng.integers(5, 500, n).astype(np.uint16) for n in lengths]
    return TokenStore(lengths, f"store {seed}", Memory(ids))


def config_of(**changes):
    config = TrainConfig(
        phases=(Phase(), Phase()),
        sequence_length=32,
        global_batch_size=4,
        gradient_accumulation_steps=2,
    )
    return dataclasses.replace(config, **changes)


# Token folders


def written(folder, count=300, seed=1):
    """A token folder of random chunks of up to 64 tokens: its stores, and the chunks by split."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    dtype, facts, chunks = np.dtype("<u2"), {}, {}
    for split, number in (("train", count), ("eval", count // 10)):
        chunks[split] = [rng.integers(0, 400, n) for n in rng.integers(3, 65, number)]
        writer = SplitWriter(folder, split, dtype)
        for ids in chunks[split]:
            writer.add(ids)
        facts[split] = writer.close()
    assert not is_store(folder)  # a run that is killed here leaves nothing that looks complete
    write_manifest(folder, count, "a tokenizer", dtype, facts)
    return open_store(folder), chunks


class TestTokenFolder:
    def test_reads_what_was_written(self, tmp_path):
        stores, chunks = written(tmp_path / "t")
        assert is_store(tmp_path / "t")
        for split, store in stores.items():
            got = store.read(np.arange(len(store.lengths)))
            for one, want in zip(got, chunks[split], strict=True):
                np.testing.assert_array_equal(one, want)
            assert store.lengths.tolist() == [len(ids) for ids in chunks[split]]
            assert store.lengths.dtype == np.int32 and store.tokenizer == "a tokenizer"
            flat = np.concatenate(got).astype("<u2").tobytes() + store.lengths.tobytes()
            assert store.fingerprint == hashlib.sha256(flat).hexdigest()

    def test_a_document_is_cut_into_chunks_with_special_tokens(self):
        got = [chunk.tolist() for chunk in cut(range(10, 21), (1, 2), 6, np.dtype("<u2"))]
        assert got == [[1, 10, 11, 12, 13, 2], [1, 14, 15, 16, 17, 2], [1, 18, 19, 20, 2]]
        assert not list(cut([], (1, 2), 6, np.dtype("<u2")))

    def test_shards_roll_over_and_others_can_read_them(self, tmp_path, monkeypatch):
        whole, _ = written(tmp_path / "whole")
        monkeypatch.setattr("train.tokens.writer.SHARD_BYTES", 5_000)
        stores, _ = written(tmp_path / "t")
        manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
        shards = manifest["train"]["shards"]
        assert len(shards) > 3
        assert shards[0]["name"] == f"train-00000-of-{len(shards):05d}.array_record"
        assert sum(s["records"] for s in shards) == manifest["train"]["chunks"]
        paths = [tmp_path / "t" / s["name"] for s in shards]
        assert [p.stat().st_size for p in paths] == [s["bytes"] for s in shards]
        with ArrayRecordDataSource(paths) as source:
            order = np.random.default_rng(0).permutation(len(source))
            for i, ids in zip(order.tolist(), stores["train"].read(order), strict=True):
                np.testing.assert_array_equal(np.frombuffer(source[i], "<u2"), ids)
                np.testing.assert_array_equal(whole["train"].read(np.array([i]))[0], ids)
        again = pickle.loads(pickle.dumps(stores["train"]))  # as it goes to a worker process
        np.testing.assert_array_equal(again.read(order[:1])[0], stores["train"].read(order[:1])[0])
        assert whole["train"].fingerprint == stores["train"].fingerprint

    def test_same_chunks_same_bytes(self, tmp_path):
        files = []
        for name in ("a", "b"):
            written(tmp_path / name)
            files.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
        assert files[0] == files[1]
        assert len(files[0]) == 5

    def test_more_than_65536_ids_take_32_bits(self, tmp_path):
        writer = SplitWriter(tmp_path, "train", np.dtype("<u4"))
        writer.add(np.array([1, 70_000, 2]))
        facts = writer.close()
        chunks = tokens._ArrayRecords([tmp_path / facts["shards"][0]["name"]], [1], np.dtype("<u4"))
        assert chunks.read(np.array([0]))[0].tolist() == [1, 70_000, 2]

    def test_damage_is_one_line_that_names_the_file(self, tmp_path):
        written(tmp_path / "good")

        def damaged(name, change, read=False):
            folder = tmp_path / "bad"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tmp_path / "good", folder)
            change(folder / name)
            with pytest.raises(ValueError, match=name) as error:
                store = open_store(folder)["train"]
                assert read  # else it is noticed without reading
                store.read(np.arange(len(store.lengths)))
            assert "\n" not in str(error.value) and error.value.__cause__ is None

        def flip(path):
            data = bytearray(path.read_bytes())
            data[200] ^= 4
            path.write_bytes(data)

        def cut(path):
            path.write_bytes(path.read_bytes()[:-7])

        shard = "train-00000-of-00001.array_record"
        damaged(shard, flip, read=True)
        damaged(shard, cut)
        damaged(shard, pathlib.Path.unlink)
        damaged("train.lengths.npy", cut)
        damaged("train.lengths.npy", lambda p: np.save(p, np.ones(3, np.int32)))
        damaged("manifest.json", lambda p: p.write_text('{"documents": 3}'))

    def test_neither_kind_of_folder(self, tmp_path):
        with pytest.raises(ValueError, match="expected a token folder .* or an MDS folder"):
            open_store(tmp_path)


# MosaicML's shards


def golden_ids(piece):
    lengths = (1, 2, 255, 256, 257, 3, 700, 40)
    return ((np.arange(lengths[piece]) * 977 + piece * 31) % 50368).astype(np.uint16)


def write_mds(folder, pieces, *, encoding="ndarray:uint16", per_shard=50, **changes):
    """A second writer of the format, from its description."""
    folder.mkdir(parents=True)
    shards = []
    for number, first in enumerate(range(0, len(pieces), per_shard)):
        samples = []
        for ids in pieces[first : first + per_shard]:
            width = 1 if len(ids) < 2**8 else 2 if len(ids) < 2**16 else 4
            array = bytes([4 + width // 2]) + len(ids).to_bytes(width, "little")
            array += ids.astype(f"<u{4 if encoding.endswith('32') else 2}").tobytes()
            samples.append(len(array).to_bytes(4, "little") + array)
        names = json.dumps({"column_names": ["input_ids"]}).encode()
        at = 4 * (len(samples) + 2) + len(names)
        ends = at + np.cumsum([0, *map(len, samples)])
        data = np.array([len(samples), *ends], "<u4").tobytes() + names + b"".join(samples)
        name = f"shard.{number:05d}.mds"
        (folder / name).write_bytes(data)
        shards.append({
            "column_encodings": [encoding], "column_names": ["input_ids"], "column_sizes": [None],
            "compression": None, "format": "mds", "hashes": [], "samples": len(samples),
            "raw_data": {"basename": name, "bytes": len(data), "hashes": {}},
            "size_limit": 1 << 26, "version": 2, "zip_data": None, **changes,
        })  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))


def some_pieces(count=400, seed=3):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 500, n).astype(np.uint16) for n in rng.integers(2, 400, count)]


class TestMds:
    @pytest.mark.parametrize("kind", ["ids", "columns"])
    def test_reads_what_the_reference_wrote(self, kind):
        stores = open_store(GOLDENS / kind, eval_fraction=0.5)
        got = sorted(
            ids.tolist() for s in stores.values() for ids in s.read(np.arange(len(s.lengths)))
        )
        assert got == sorted(golden_ids(piece).tolist() for piece in range(8))
        for store in stores.values():
            for i in np.arange(len(store.lengths))[::-1]:
                assert len(store.read(np.array([i]))[0]) == store.lengths[i]

    @pytest.mark.parametrize("encoding", ["ndarray:uint16", "ndarray:uint32"])
    def test_lengths_of_one_two_and_four_bytes(self, tmp_path, encoding):
        lengths = [1, 255, 256, 8193, 65_535, 65_536, 65_537, 70_000]
        pieces = [np.arange(n) % 500 for n in lengths]
        write_mds(tmp_path / "a", pieces, encoding=encoding)
        shards = MdsShards(tmp_path / "a")
        assert shards.lengths.tolist() == lengths
        for got, want in zip(shards.read(np.arange(len(lengths))), pieces, strict=True):
            np.testing.assert_array_equal(got, want)

    def test_holds_out_by_the_ids_alone(self, tmp_path):
        pieces = some_pieces()
        write_mds(tmp_path / "a", pieces)
        write_mds(tmp_path / "b", pieces[::-1], per_shard=30)
        held_out = []
        for name in ("a", "b"):
            stores = open_store(tmp_path / name, eval_fraction=0.2)
            sizes = [len(stores[split].lengths) for split in ("train", "eval")]
            assert sum(sizes) == 400 and 50 < sizes[1] < 110  # 80, five standard deviations: 40
            ids = stores["eval"].read(np.arange(sizes[1]))
            held_out.append(sorted(i.tolist() for i in ids))
            assert stores["train"].fingerprint != stores["eval"].fingerprint
        share = lambda ids: int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8], "big")  # noqa: E731
        want = [ids.tolist() for ids in pieces if share(ids) / 2**64 < 0.2]
        assert held_out[0] == held_out[1] == sorted(want)

    def test_the_choice_is_kept(self, tmp_path, monkeypatch):
        write_mds(tmp_path / "a", some_pieces())
        first = open_store(tmp_path / "a", 0.2, tmp_path / "cache")
        with monkeypatch.context() as patch:
            patch.setattr(MdsShards, "in_order", None)  # the hashes cannot be made again
            again = open_store(tmp_path / "a", 0.2, tmp_path / "cache")
        np.testing.assert_array_equal(again["eval"].lengths, first["eval"].lengths)
        assert again["train"].fingerprint == first["train"].fingerprint
        other = open_store(tmp_path / "a", 0.5, tmp_path / "cache")
        assert len(other["eval"].lengths) > len(again["eval"].lengths)

    def test_other_ids_of_the_same_lengths_are_chosen_anew(self, tmp_path):
        pieces = some_pieces()
        write_mds(tmp_path / "a", pieces)
        open_store(tmp_path / "a", 0.2, tmp_path / "cache")
        shutil.rmtree(tmp_path / "a")
        write_mds(tmp_path / "a", [ids[::-1].copy() for ids in pieces])
        got, want = (open_store(tmp_path / "a", 0.2, c) for c in (tmp_path / "cache", None))
        for kept, made in zip(*(s["eval"].read(np.arange(40)) for s in (got, want)), strict=True):
            np.testing.assert_array_equal(kept, made)

    def test_train_and_eval_folders(self, tmp_path):
        pieces = some_pieces()
        write_mds(tmp_path / "a" / "train", pieces[:300])
        assert len(open_store(tmp_path / "a", 0.2)["train"].lengths) < 280
        write_mds(tmp_path / "a" / "eval", pieces[300:])
        stores = open_store(tmp_path / "a")
        assert [len(stores[s].lengths) for s in ("train", "eval")] == [300, 100]
        for i, ids in enumerate(stores["eval"].read(np.arange(100))):
            np.testing.assert_array_equal(ids, pieces[300 + i])

    @pytest.mark.parametrize(
        ("changes", "expect"),
        [
            ({"encoding": "pkl"}, "expected a column input_ids of ndarray:uint16.*got .*pkl"),
            ({"encoding": "ndarray:float32"}, "got 'input_ids' ndarray:float32"),
            ({"encoding": "ndarray:uint16:512"}, "got 'input_ids' ndarray:uint16:512"),
            ({"column_names": ["tokens"]}, "got 'tokens' ndarray:uint16"),
            ({"version": 1}, "expected format mds, version 2, got mds, version 1"),
            ({"format": "json"}, "got json, version 2"),
            ({"raw_data": {"basename": "no.mds", "bytes": 3}}, "no.mds: expected this shard"),
            (
                {"raw_data": {"basename": "no.mds", "bytes": 3}, "zip_data": {"basename": "z"}},
                "no.mds: .*its compressed form only: decompress",
            ),
            ({"samples": 3}, "shard.00000.mds: .*cut or damaged"),
        ],
    )  # fmt: skip
    def test_refuses_in_one_line(self, tmp_path, changes, expect):
        write_mds(tmp_path / "a", some_pieces(60), **changes)
        with pytest.raises(ValueError, match=expect) as error:
            open_store(tmp_path / "a")
        assert "\n" not in str(error.value)

    def test_damage_names_the_file(self, tmp_path):
        write_mds(tmp_path / "a", some_pieces(60))
        path = tmp_path / "a" / "shard.00001.mds"
        good = path.read_bytes()
        for part in (good[:-5], good[:50], good[:2]):
            path.write_bytes(part)
            with pytest.raises(ValueError, match=r"shard.00001.mds: .*cut or damaged"):
                open_store(tmp_path / "a", 0.5)
        first = int.from_bytes(good[4:8], "little")
        path.write_bytes(good[: first + 4] + b"\x09" + good[first + 5 :])  # two dimensions
        with pytest.raises(ValueError, match=r"shard.00001.mds: .*in sample 0"):
            open_store(tmp_path / "a", 0.5)
        (tmp_path / "a" / "index.json").write_text("{}")
        with pytest.raises(ValueError, match=r"index.json: .*without 'shards'"):
            open_store(tmp_path / "a")


class TestStores:
    def test_joined_reads_each_from_its_own(self):
        stores = [memory_store(n, seed=n) for n in (5, 1, 9)]
        both = joined(stores)
        want = [ids for store in stores for ids in store.chunks.ids]
        order = np.random.default_rng(0).permutation(15)
        for i, ids in zip(order, both.read(order), strict=True):
            np.testing.assert_array_equal(ids, want[i])
            assert both.lengths[i] == len(ids)
        assert joined(stores[:1]) is stores[0]
        assert joined(stores[::-1]).fingerprint != both.fingerprint
        pickle.loads(pickle.dumps(both))

    def test_joined_refuses_two_tokenizers(self):
        one, two = (
            dataclasses.replace(memory_store(seed=s), tokenizer=t) for s, t in enumerate("ab")
        )
        with pytest.raises(ValueError, match="expected one tokenizer, they were prepared with 2"):
            joined([one, two, memory_store()])
        assert joined([one, memory_store()]).tokenizer == "a"

    def test_counts(self, monkeypatch):
        store = memory_store(3000)
        want = np.bincount(np.concatenate(store.chunks.ids), minlength=600)
        np.testing.assert_array_equal(store.counts(600), want)
        monkeypatch.setattr(tokens, "_COUNTED", 10_000)
        part = memory_store(3000)
        counts = part.counts(600)
        assert 8_000 < counts.sum() < 13_000 and len(part.chunks.seen) < 1000


# Batches


def make(store, config, **where):
    return Batches(store, MASKING, config, **{"phase": 0, "threads": 1} | where)


def place(batch):
    """Where the next step starts, as a checkpoint keeps it."""
    return {"epoch": batch.epoch, "row": batch.row}


class TestBatches:
    def test_rows_hold_what_the_documents_say(self):
        store = memory_store()
        batch = next(make(store, config_of()))
        assert batch.arrays["input_ids"].shape == (2, 2, 32)
        assert batch.arrays["dropped"].shape == (2, 2)
        assert {a.dtype for a in batch.arrays.values()} == {np.dtype(np.int32)}
        a = {k: v.reshape(4, -1) for k, v in batch.arrays.items()}
        documents = {tuple(ids) for ids in store.chunks.ids}
        for row in range(4):
            original = a["input_ids"][row].copy()
            used = a["labels"][row] != IGNORE_INDEX
            original[a["predict_positions"][row][used]] = a["labels"][row][used]
            segments = a["segment_ids"][row]
            for number in range(1, segments.max() + 1):
                assert tuple(original[segments == number]) in documents
            assert not original[segments == 0].any()
        assert batch.tokens == (a["segment_ids"] > 0).sum()
        assert batch.masked == (a["labels"] != IGNORE_INDEX).sum() > 0
        assert batch.tokens == store.lengths[batch.documents].sum()

    def test_resumed_in_the_middle_goes_on_alike_across_epochs(self):
        store, config = memory_store(), config_of()
        whole = make(store, config, phase=1)
        batches = [next(whole) for _ in range(12)]
        assert batches[-1].epoch >= 1
        for stop in (1, 5, 8):
            rest = make(store, config, phase=1, **place(batches[stop - 1]))
            for want in batches[stop:]:
                got = next(rest)
                assert (got.tokens, place(got)) == (want.tokens, place(want))
                for key in want.arrays:
                    np.testing.assert_array_equal(got.arrays[key], want.arrays[key])

    @pytest.mark.parametrize("documents", [40, 1])  # alone in its row, a piece differs by its mask
    def test_epochs_phases_and_seeds_differ(self, documents):
        store = memory_store(documents, longest=30 if documents > 1 else 31)
        first = [
            next(make(store, config_of(**changes), **where)).arrays["predict_positions"][0, 0]
            for changes, where in (
                ({}, {}), ({}, {"phase": 1}), ({}, {"epoch": 1}), ({"seed": 18}, {}),
            )
        ]  # fmt: skip
        assert len({tuple(positions) for positions in first}) == 4

    @pytest.mark.parametrize(
        "size, gradient_accumulation_steps",
        [(8, 2), (10, 4)],
        ids=["whole", "last micro-batch not full"],
    )
    def test_another_number_of_hosts_loses_and_repeats_nothing(
        self, size, gradient_accumulation_steps
    ):
        """Two hosts for some steps, then four, then one, over three epochs; by the pieces read."""
        store = memory_store(331)
        config = config_of(
            global_batch_size=size, gradient_accumulation_steps=gradient_accumulation_steps
        )
        used = config.micro_batch_size
        alone = make(store, config)
        at = {"epoch": 0, "row": 0}
        rows = alone._plans.epoch_rows
        assert rows % size  # so that epochs change inside a step
        seen: list[int] = []
        counts = {0: 2, 3: 4, 8: 1, rows // size + 2: 2}  # of hosts, from each of these steps on
        for step in range(3 * rows // size + 1):
            if step in counts:
                count = counts[step]
                hosts = [
                    make(store, config, **at, slots=np.arange(4).reshape(count, -1)[h])
                    for h in range(count)
                ]
            parts = [next(host) for host in hosts]
            want = next(alone)
            assert len({(p.tokens, p.sequences, p.epoch, p.row) for p in parts}) == 1
            assert parts[0].tokens == want.tokens and place(parts[0]) == place(want)
            for key, value in want.arrays.items():
                np.testing.assert_array_equal(
                    np.concatenate([p.arrays[key] for p in parts], axis=1)[:, :used], value
                )
            seen += [int(d) for p in parts for d in p.documents]
            assert sorted(np.concatenate([p.documents for p in parts])) == sorted(want.documents)
            at = place(parts[0])
        assert at["epoch"] == 3  # the last step has begun on the fourth epoch
        plan = plan_rows(store.lengths, 32, (17, 0, 3))
        begun = Counter(plan.documents[: plan.starts[at["row"]]].tolist())
        assert Counter(seen) - begun == Counter(dict.fromkeys(range(331), 3))

    def test_reads_its_own_rows_only(self):
        """What is read ahead included."""
        store, slots = memory_store(3000), np.array([1, 2])
        batches = make(
            store, config_of(global_batch_size=8, gradient_accumulation_steps=2), slots=slots
        )
        first = next(batches).documents
        batches.close()
        plan = plan_rows(store.lengths, 32, (17, 0, 0))
        own = {int(d) for r in range(len(plan)) if r % 4 in slots for d in plan.row(r)}
        assert set(first.tolist()) <= set(store.chunks.seen) <= own

    def test_slots_beyond_the_micro_batch_are_padding(self):
        config, store = config_of(), memory_store()
        whole = next(make(store, config)).arrays
        batch = next(make(store, config, slots=np.array([5, 1, 2])))
        assert batch.arrays["labels"].shape[:2] == (2, 3)
        for key, value in batch.arrays.items():
            np.testing.assert_array_equal(value[:, 1], whole[key][:, 1])
            assert (value[:, [0, 2]] == (IGNORE_INDEX if key == "labels" else 0)).all()
        empty = make(store, config, slots=np.array([2, 3]))
        batch = next(empty)
        assert not len(batch.documents) and batch.tokens > 0
        assert (batch.arrays["segment_ids"] == 0).all() and not store.chunks.seen.get(-1)
        assert next(empty).row == 8

    def test_an_epoch_shows_each_document_once(self):
        store = memory_store()
        rows = len(plan_rows(store.lengths, 32, (17, 0, 0)))
        batch = next(make(store, config_of(global_batch_size=rows, gradient_accumulation_steps=1)))
        assert batch.tokens == store.lengths.sum()
        assert sorted(batch.documents) == list(range(40)) and place(batch) == {"epoch": 1, "row": 0}

    def test_rows_rise_with_the_phases_clock(self):
        """Batch-size warm-up: as the clock says, also after a restart in the middle of it."""
        phase = Phase(tokens=10**6, batch_size_warmup_start=2, batch_size_warmup_tokens=1500)
        config = config_of(global_batch_size=8, gradient_accumulation_steps=4, phases=(phase,))
        store = memory_store(331)
        batches, clock, at = make(store, config), 0, []
        for step in range(30):
            batch = next(batches)
            assert (
                batch.sequences
                == phase.batch_size_at(clock, 8, 2)
                == 2 * len(batch.arrays["labels"])
            )
            clock += batch.tokens
            assert batch.tokens == (batch.arrays["segment_ids"] > 0).sum()
            at.append((batch, clock))
            if step == 4:
                resumed = make(store, config, **place(batch), tokens=clock)
            if step > 4:
                same = next(resumed)
                assert same.sequences == batch.sequences
                np.testing.assert_array_equal(same.documents, batch.documents)
        assert [b.sequences for b, _ in at] == sorted(b.sequences for b, _ in at)
        assert {b.sequences for b, _ in at} == {2, 4, 6, 8}
        first = plan_rows(store.lengths, 32, (17, 0, 0))
        used = at[6][0].row
        seen = np.concatenate([b.documents for b, _ in at[:7]])
        np.testing.assert_array_equal(seen, first.documents[: first.starts[used]])

    def test_surplus_picks_keep_their_token_and_are_counted(self, monkeypatch):
        monkeypatch.setattr("train.pretrain.data.predicted_positions", lambda length, rate: 8)
        batch = next(Batches(memory_store(), Masking(0.9, 4, 500, ()), config_of(), phase=0))
        assert (batch.arrays["dropped"] > 0).all() and batch.dropped == batch.arrays[
            "dropped"
        ].sum()
        assert batch.masked == 4 * 8
        a = {k: v.reshape(4, -1) for k, v in batch.arrays.items()}
        for row in range(4):
            others = np.setdiff1d(np.arange(32), a["predict_positions"][row])
            assert 4 not in a["input_ids"][row][others]

    @pytest.mark.slow
    def test_worker_processes_make_the_same_batches(self, tmp_path):
        self.same(tmp_path, workers=2)

    def test_threads_make_the_same_batches(self, tmp_path, monkeypatch):
        monkeypatch.setattr("train.tokens.writer.SHARD_BYTES", 5_000)
        self.same(tmp_path, threads=8)

    def same(self, tmp_path, **how):
        store = written(tmp_path / "t")[0]["train"]
        config = config_of(sequence_length=64)
        one, other = (Batches(store, MASKING, config, phase=0, **h) for h in ({"threads": 1}, how))
        epoch = 0
        while epoch < 2:
            want, got = next(one), next(other)
            epoch = want.epoch
            np.testing.assert_array_equal(got.documents, want.documents)
            for key in want.arrays:
                np.testing.assert_array_equal(got.arrays[key], want.arrays[key])
        one.close()
        other.close()

    def test_errors_of_readers_come_out(self):
        store = memory_store()
        batches = Batches(store, Masking(0.3, 4, 100, ()), config_of(), phase=0)
        with pytest.raises(ValueError, match="expected less than the tokenizer's 100, got"):
            next(batches)
        batches.close()

    def test_pieces_longer_than_a_row(self):
        lengths = np.array([70, 64, 65])
        ids = [np.arange(n).astype(np.uint16) for n in lengths]
        store = TokenStore(lengths, "x", Memory(ids))
        expect = "documents have up to 70 tokens, sequence_length is 64"
        with pytest.raises(ValueError, match=expect):
            make(store, config_of(sequence_length=64))
        store = TokenStore(lengths[1:], "x", Memory(ids[1:]))
        batch = next(
            make(
                store,
                config_of(sequence_length=64, global_batch_size=2, gradient_accumulation_steps=1),
            )
        )
        assert batch.tokens == 128 == (batch.arrays["segment_ids"] == 1).sum()
        with pytest.raises(ValueError, match="expected documents to train on, got none"):
            make(TokenStore(lengths[:0], "x", Memory([])), config_of())


class TestPlans:
    def test_every_epoch_has_as_many_rows(self):
        store = memory_store(500)
        assert len({len(plan_rows(store.lengths, 32, (17, 0, e))) for e in range(20)}) == 1

    def test_the_next_plan_is_made_before_it_is_asked_for(self):
        store = memory_store(500)
        plans = Plans(store, 32, (17, 0))
        plans.epoch_rows = len(plans(0))
        plans.row(plans.epoch_rows // 2 - 1)
        assert 1 not in plans._made
        plans.row(plans.epoch_rows // 2 + 1)
        assert 1 in plans._made
        deadline = time.monotonic() + 20
        while not plans._made[1].done():
            assert time.monotonic() < deadline
        for epoch in range(1, 8):
            assert plans.row(epoch * plans.epoch_rows)[0] == epoch
        assert len(plans._made) <= 3
        plans.close()


class TestEvalBatches:
    def test_the_slots_of_all_hosts_make_the_whole(self):
        store = memory_store(60)
        config = config_of(global_batch_size=4, gradient_accumulation_steps=1, eval_sequences=10)
        whole = eval_batches(store, MASKING, config)
        assert len(whole) == 3 and whole[0]["input_ids"].shape == (4, 32)
        assert [(b["segment_ids"] > 0).any(axis=1).sum() for b in whole] == [4, 4, 2]
        halves = [eval_batches(store, MASKING, config, np.array(s)) for s in ([0, 2, 4], [5, 1, 3])]
        for batch, one, two in zip(whole, *halves, strict=True):
            for key in batch:
                np.testing.assert_array_equal(one[key][:2], batch[key][[0, 2]])
                np.testing.assert_array_equal(two[key][1:], batch[key][[1, 3]])
            assert not one["segment_ids"][2].any() and (two["labels"][0] == IGNORE_INDEX).all()

    def test_the_mask_is_fixed(self):
        store, config = memory_store(60), config_of(eval_sequences=6)
        one, two = (eval_batches(store, MASKING, config) for _ in range(2))
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a["labels"], b["labels"])
