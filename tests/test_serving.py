"""Exported functions and the compile cache: the same answers, without tracing the model."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

from modernbert_jax import Embedder, ModernBertConfig, ModernBertForMaskedLM, pipeline
from modernbert_jax.checkpoint.params import flatten
from modernbert_jax.inference.cli import main
from modernbert_jax.inference.export import FUNCTIONS, load
from modernbert_jax.inference.trust import remember, unknown_calls, weights_digest

TEXT = "the patient has [MASK] fever"


@pytest.fixture(scope="module")
def model(tmp_path_factory, small_tokenizer):
    folder = tmp_path_factory.mktemp("model")
    config = ModernBertConfig.tiny(vocab_size=len(small_tokenizer), num_hidden_layers=2)
    model = ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
    model.save_pretrained(folder, tokenizer=small_tokenizer)
    path = folder / "config.json"
    names = ("id2label", "label2id", "layer_types", "rope_parameters")  # as the release has it
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in names}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The digests of these tests' exports go to a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODERNBERT_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    assert main(["export", str(model), str(folder), "--tokens", "50", "64"]) == 0
    return folder


@pytest.fixture(scope="module")
def embedding(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding")
    Embedder.from_pretrained(model).export(folder, tokens=[64])
    return folder


def never(*args, **kwargs):
    raise AssertionError("the model was traced")


class TestExport:
    def test_the_same_answers_without_tracing(self, model, served, embedding, monkeypatch):
        want = pipeline("fill-mask", model)(TEXT)
        vector = Embedder.from_pretrained(model).encode(TEXT)
        pipe = pipeline("fill-mask", served, exported=True)
        embedder = Embedder.from_pretrained(embedding, exported=True)
        monkeypatch.setattr("modernbert_jax.model.ModernBertModel.__call__", never)
        assert pipe(TEXT) == want
        np.testing.assert_array_equal(embedder.encode(TEXT), vector)
        with pytest.raises(AssertionError, match="was traced"):
            pipe("the patient " * 60 + "[MASK]")  # a size that was not exported

    def test_other_options_are_other_functions(self, model, served, embedding):
        """What was exported for the mean must not answer for "cls", another layer or dtype."""
        for options in ({"pooling": "cls"}, {"layer": 0}, {"normalize": False}):
            a = Embedder.from_pretrained(model, **options).encode(TEXT)
            b = Embedder.from_pretrained(embedding, exported=True, **options).encode(TEXT)
            np.testing.assert_array_equal(a, b)
        pipe = pipeline("fill-mask", served, dtype="bfloat16", exported=True)
        assert pipe(TEXT) == pipeline("fill-mask", model, dtype="bfloat16")(TEXT)

    def test_a_length_is_rounded_to_a_row(self, model, tmp_path, capsys, monkeypatch):
        assert main(["export", str(model), str(tmp_path), "--tokens", "100", "101"]) == 0
        assert capsys.readouterr().out.endswith("fill-mask, sequences of 112 tokens\n")
        pipe = pipeline("fill-mask", tmp_path, exported=True)
        text = "\u00e9" * 48 + "[MASK]"  # two bytes each: 99 tokens
        assert len(pipe.tokenizer(text)["input_ids"]) in range(97, 113)
        monkeypatch.setattr("modernbert_jax.model.ModernBertModel.__call__", never)
        assert len(pipe(text)) == 5

    def test_another_platform(self, model, tmp_path):
        pipeline("fill-mask", model).export(tmp_path, tokens=[64], platforms=["tpu"])
        with pytest.warns(UserWarning, match="not used .made for tpu., so this shape is traced"):
            pipeline("fill-mask", tmp_path, exported=True)(TEXT)
        pipeline("fill-mask", model).export(tmp_path, tokens=[64], platforms=["tpu", "cpu"])
        got = pipeline("fill-mask", tmp_path, exported=True)(TEXT)
        assert got == pipeline("fill-mask", model)(TEXT)

    def test_what_is_written_is_a_checkpoint(self, model, served, embedding):
        loaded, tokenizer, folder = load(ModernBertForMaskedLM, served, None, {})
        assert folder is None and tokenizer.mask_token == "[MASK]"
        names = [path.name for f in (served, embedding) for path in (f / FUNCTIONS).iterdir()]
        assert [re.sub("-[0-9a-f]{12}-", " ", name) for name in names] == [
            "fill-mask 1x64-1x64-1x4.jax_export",
            "embed-2-mean-unit 1x64-1x64-4.jax_export",
        ]
        with pytest.raises(FileExistsError, match="expected a new folder or a ModernBertModel"):
            Embedder.from_pretrained(model).export(served)


def foreign(folder, function=lambda params, ids, segments, positions: positions * 0.0):
    """Puts a program beside the weights that was not exported there; returns its file."""
    (path,) = (folder / FUNCTIONS).iterdir()
    params = {k: np.asarray(v) for k, v in flatten(load_mlm(folder)).items()}
    ids, positions = np.zeros((1, 64), np.int32), np.zeros((1, 4), np.int32)
    made = jax.export.export(jax.jit(function))(params, ids, ids, positions)
    path.write_bytes(bytes(made.serialize()))
    return path


def load_mlm(folder):
    return ModernBertForMaskedLM.from_pretrained(folder)


class TestTrust:
    """A program beside the weights runs only if this user exported it and asks for it."""

    def refused(self, folder, reason):
        want = pipeline("fill-mask", folder)(TEXT)
        with pytest.warns(UserWarning, match=f"not used .{reason}"):
            got = pipeline("fill-mask", folder, exported=True)(TEXT)
        assert got == want

    def test_a_swapped_program(self, served, tmp_path, model):
        shutil.copytree(served, tmp_path / "m")
        assert pipeline("fill-mask", tmp_path / "m", exported=True)(TEXT)
        foreign(tmp_path / "m")
        want = pipeline("fill-mask", model)(TEXT)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pipeline("fill-mask", tmp_path / "m")(TEXT) == want  # nobody asked for it
        self.refused(tmp_path / "m", "not exported by this user on this machine")

    def test_a_truncated_program(self, served, tmp_path):
        shutil.copytree(served, tmp_path / "m")
        (path,) = (tmp_path / "m" / FUNCTIONS).iterdir()
        path.write_bytes(path.read_bytes()[:100])
        self.refused(tmp_path / "m", "not exported by this user")

    def test_another_user(self, served, tmp_path, monkeypatch):
        monkeypatch.setenv("MODERNBERT_JAX_CACHE", str(tmp_path))
        self.refused(served, "not exported by this user")

    @pytest.mark.parametrize("change", ["weights", "version"])
    def test_other_weights_or_another_version(self, served, tmp_path, monkeypatch, change):
        shutil.copytree(served, tmp_path / "m")
        if change == "weights":
            text = (tmp_path / "m" / "config.json").read_text()
            (tmp_path / "m" / "config.json").write_text(text + " ")
        else:
            monkeypatch.setattr("modernbert_jax.__version__", "9.9.9")
        self.refused(tmp_path / "m", "exported for other weights or by another version")

    def test_a_program_with_disabled_checks(self, served, tmp_path):
        """Even one with a known digest: it may call any code of this process by name."""

        def calls(params, ids, segments, positions):
            result = jax.ShapeDtypeStruct((1, 4), np.float32)
            return jax.ffi.ffi_call("some_target", result)(positions)

        (path,) = (served / FUNCTIONS).iterdir()
        params = {k: np.asarray(v) for k, v in flatten(load_mlm(served)).items()}
        ids, positions = np.zeros((1, 64), np.int32), np.zeros((1, 4), np.int32)
        checks = [jax.export.DisabledSafetyCheck.custom_call("some_target")]
        export = jax.export.export(jax.jit(calls), disabled_checks=checks)
        made = export(params, ids, ids, positions)
        assert unknown_calls(made.mlir_module()) == ["some_target"]
        ours = jax.export.deserialize(bytearray(path.read_bytes()))
        assert unknown_calls(ours.mlir_module()) == []
        shutil.copytree(served, tmp_path / "m")
        program = bytes(made.serialize())
        (tmp_path / "m" / FUNCTIONS / path.name).write_bytes(program)
        remember(program, weights_digest(tmp_path / "m"))
        self.refused(tmp_path / "m", "it was exported with safety checks disabled")

    def test_calls_are_found_in_both_forms(self):
        """Any name may be quoted, and the generic form of an operation names it elsewhere."""
        text = """
          %0 = stablehlo.custom_call @Sharding(%arg0) : (tensor<1xf32>) -> tensor<1xf32>
          %1 = stablehlo.custom_call @"a b"(%0) : (tensor<1xf32>) -> tensor<1xf32>
          %2 = "stablehlo.custom_call"(%1) <{call_target_name = "cb"}> : () -> tensor<1xf32>
        """
        assert unknown_calls(text) == ["a b", "cb"]

    def test_a_hub_id_or_a_folder_without_functions(self, model):
        for source in ("some/model", model):
            with pytest.raises(ValueError, match="exported: expected a local folder with functio"):
                pipeline("fill-mask", source, exported=True)
            with pytest.raises(ValueError, match="exported: expected a local folder with functio"):
                Embedder.from_pretrained(source, exported=True)
        with pytest.raises(ValueError, match="exported: .*got ModernBertForMaskedLM"):
            pipeline("fill-mask", load_mlm(model), exported=True)


class TestLoad:
    def test_the_revision_is_the_models_and_the_tokenizers(self, model, monkeypatch):
        asked = []

        def resolve(path, revision=None):
            asked.append((path, revision))
            return model

        for module in ("export", "embedder"):
            monkeypatch.setattr(f"modernbert_jax.inference.{module}.resolve", resolve)
        pipeline("fill-mask", "some/model", revision="v1")
        Embedder.from_pretrained("some/model", revision="v2")
        assert asked[:2] == [("some/model", "v1"), ("some/model", "v2")]

    def test_what_does_not_go_together(self, model, small_tokenizer):
        loaded = ModernBertForMaskedLM.from_pretrained(model)
        with pytest.raises(
            TypeError, match="dtype: expected none with a model that is already loaded"
        ):
            pipeline("fill-mask", loaded, small_tokenizer, dtype="bfloat16")
        small = ModernBertForMaskedLM(ModernBertConfig.tiny(vocab_size=64), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="ids below the model's vocab_size 64, got 299"):
            pipeline("fill-mask", small, small_tokenizer)


class TestCompileCache:
    CODE = """
import sys, warnings
import jax
from jax._src import monitoring
hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name))
from modernbert_jax import pipeline
print(pipeline("fill-mask", sys.argv[1], compile_cache=sys.argv[2])(sys.argv[3])[0]["token"])
print(sum(h == "/jax/compilation_cache/cache_hits" for h in hits))
print(sum(h == "/jax/compilation_cache/cache_misses" for h in hits))
"""

    def test_the_next_process_compiles_nothing(self, model, tmp_path):
        cache = tmp_path / "cache"
        env = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
        out = []
        for _ in range(2):
            command = [sys.executable, "-c", self.CODE, str(model), str(cache), TEXT]
            done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
            out.append(done.stdout.split())
        assert out[0][0] == out[1][0]
        assert int(out[0][2]) > 0 and int(out[1][1]) > int(out[0][1])
        assert int(out[1][2]) == 0


class TestCommand:
    def test_answer_prints_the_answer(self, served, embedding, capsys):
        assert main(["answer", str(served), "--exported", "--text", TEXT]) == 0
        got = json.loads(capsys.readouterr().out)
        want = pipeline("fill-mask", served)(TEXT)
        assert [line["token_str"] for line in got] == [line["token_str"] for line in want]
        assert main(["answer", str(embedding), "--task", "embed", "--text", TEXT]) == 0
        got = json.loads(capsys.readouterr().out)
        want = Embedder.from_pretrained(embedding).encode(TEXT)
        np.testing.assert_allclose(got, want, atol=1e-6)

    def test_times_for_benchmark(self, served, capsys):
        before = jax.config.jax_compilation_cache_dir
        assert main(["answer", str(served), "--text", TEXT, "--began", str(time.time() - 1)]) == 0
        out = capsys.readouterr().out
        for line in (
            "python and imports",
            "weights",
            "first answer",
            "second answer",
            "cold start",
        ):
            assert re.search(rf"  {line}.* \d+\.\d{{3}} s", out)
        assert jax.config.jax_compilation_cache_dir == before
        assert "[MASK]" not in out and "fever" not in out  # a text is never printed

    @pytest.mark.slow
    def test_time_runs_two_processes(self, embedding, tmp_path, capfd):
        cache = tmp_path / "cache"
        assert (
            main(
                [
                    "benchmark",
                    str(embedding),
                    "--task",
                    "embed",
                    "--exported",
                    "--compile-cache",
                    str(cache),
                ]
            )
            == 0
        )
        out = capfd.readouterr().out
        assert out.index("first process:") < out.index("second process:")
        assert out.count("cold start in total") == 2

    def test_bad_input_is_one_line(self, model, tmp_path, capsys):
        assert main(["answer", str(tmp_path / "nothing")]) == 2
        assert main(["export", str(model), str(tmp_path / "out"), "--task", "translation"]) == 2
        lines = capsys.readouterr().err.strip().split("\n")
        assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
        assert "expected a checkpoint folder" in lines[0] and "'translation'" in lines[1]
