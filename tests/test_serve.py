"""`modernbert-jax serve`: the answers, the limits, and what happens when something fails."""

import asyncio
import base64
import collections
import contextlib
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import httpx2
import numpy as np
import prometheus_client.parser
import pytest
from flax import nnx
from starlette.testclient import TestClient

from modernbert_jax import (
    Embedder,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForSequenceClassification,
    ModernBertModel,
    Reranker,
    TextClassification,
    cli as umbrella,
    pipeline,
)
from modernbert_jax.auto import read_class
from modernbert_jax.checkpoint.orbax import save_orbax
from modernbert_jax.checkpoint.params import flatten
from modernbert_jax.inference.export import FUNCTIONS
from modernbert_jax.inference.sentence import Normalize, Pooling, SentenceModel
from modernbert_jax.packing import SLOT_TOKENS
from modernbert_jax.serve import cli
from modernbert_jax.serve.app import Limits, Service
from modernbert_jax.serve.batcher import Batcher, Closed, QueueFull
from modernbert_jax.serve.endpoints import PATHS, Endpoint, Work, endpoints_of, task_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = "the patient has no fever denies cough and pain seen today with a rash".split()
SECRET = "zebra7 of the patient"  # a text that must not appear in logs and errors
LIMITS = Limits(row_tokens=128, queue_tokens=4096, seconds=60.0)


def texts_of(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, longest, count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_tokenizer):
    """Seeded checkpoints by name."""
    root = tmp_path_factory.mktemp("models")
    config = {"vocab_size": len(small_tokenizer), "num_hidden_layers": 2}
    classes = {
        "encoder": (ModernBertModel, {}),
        "mlm": (ModernBertForMaskedLM, {}),
        "classifier": (ModernBertForSequenceClassification, {"num_labels": 3}),
        "reranker": (ModernBertForSequenceClassification, {"num_labels": 1}),
        "choice": (ModernBertForMultipleChoice, {}),
    }
    for name, (cls, more) in classes.items():
        model = cls(ModernBertConfig.tiny(**config, **more), rngs=nnx.Rngs(0))
        model.save_pretrained(root / name, tokenizer=small_tokenizer)
    return root


def runner_of(folder: pathlib.Path):
    if folder.name == "encoder":
        return Embedder.from_pretrained(folder)
    task = "fill-mask" if folder.name == "mlm" else "text-classification"
    return pipeline(task, folder, batch_tokens=LIMITS.row_tokens)


@contextlib.contextmanager
def client_of(
    runner_or_endpoints, limits: Limits = LIMITS, token: str | None = None, reranker=None
):
    """A client of a server in this process."""
    if isinstance(runner_or_endpoints, list):
        endpoints, missing = runner_or_endpoints, {}
    else:
        endpoints, missing = endpoints_of(runner_or_endpoints, "tiny", limits.row_tokens, reranker)
    service = Service(endpoints, missing, limits, token)
    client = TestClient(service.app, base_url="http://127.0.0.1")
    client.service = service  # type: ignore[attr-defined]
    try:
        yield client
    finally:
        service.close()


@pytest.fixture(scope="module")
def embedder(folders):
    return Embedder.from_pretrained(folders / "encoder")


@pytest.fixture(scope="module")
def embed(embedder):
    with client_of(embedder) as client:
        yield client


@pytest.fixture(scope="module")
def classify(folders):
    with client_of(runner_of(folders / "classifier")) as client:
        yield client


def vectors_of(response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]], np.float32)


def refused(response, status: int, match: str) -> dict:
    """Checks that a response is one error in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(match, error["message"]), error["message"]
    assert "\n" not in error["message"] and "zebra" not in response.text
    return error


class TestEmbeddings:
    def test_values_and_usage(self, embed, embedder, small_tokenizer):
        texts = texts_of(20)
        response = embed.post("/v1/embeddings", json={"input": texts, "model": "tiny"})
        np.testing.assert_allclose(vectors_of(response), embedder.encode(texts), atol=2e-6)
        answer = response.json()
        tokens = sum(len(ids) for ids in small_tokenizer(texts)["input_ids"])
        assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        assert (answer["object"], answer["model"]) == ("list", "tiny")
        assert [item["index"] for item in answer["data"]] == list(range(20))
        assert {item["object"] for item in answer["data"]} == {"embedding"}

    def test_a_single_text_and_token_ids(self, embed, embedder, small_tokenizer):
        want = embedder.encode([WORDS[0], "a rash"])
        ids = small_tokenizer([WORDS[0], "a rash"])["input_ids"]
        for given, expected in ((WORDS[0], want[:1]), (ids[0], want[:1]), (ids, want)):
            got = vectors_of(embed.post("/v1/embeddings", json={"input": given}))
            np.testing.assert_allclose(got, expected, atol=2e-6)

    def test_base64_is_little_endian_float32(self, embed, embedder):
        body = {"input": texts_of(3), "encoding_format": "base64"}
        data = embed.post("/v1/embeddings", json=body).json()["data"]
        got = np.stack([np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in data])
        np.testing.assert_allclose(got, embedder.encode(texts_of(3)), atol=2e-6)

    def test_dimensions_are_cut_and_scaled_again(self, embed, embedder):
        got = vectors_of(embed.post("/v1/embeddings", json={"input": "pain", "dimensions": 5}))
        want = embedder.encode("pain")[:5]
        np.testing.assert_allclose(got[0], want / np.linalg.norm(want), atol=1e-5)

    def test_long_texts_are_refused_or_truncated(self, folders):
        embedder = Embedder.from_pretrained(folders / "encoder", max_length=20)
        text = " ".join(WORDS * 3)
        with client_of(embedder) as client:
            error = refused(
                client.post("/v1/embeddings", json={"input": ["a", text]}),
                413, "at most 20 tokens per text, number 1 has .* \"truncate\": true",
            )  # fmt: skip
            assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
            response = client.post("/v1/embeddings", json={"input": text, "truncate": True})
            np.testing.assert_allclose(vectors_of(response)[0], embedder.encode(text), atol=2e-6)
            assert response.json()["usage"]["total_tokens"] == 20
            ids = embedder.tokenizer(text)["input_ids"]
            response = client.post("/v1/embeddings", json={"input": ids, "truncate": True})
            want = embedder.encode_ids([ids[:20]])
            np.testing.assert_allclose(vectors_of(response), want, atol=2e-6)

    @pytest.mark.parametrize("include_prompt", [True, False])
    def test_a_default_prompt_counts(self, embedder, include_prompt):
        """The prompt of a folder of sentence-transformers precedes each text."""
        prompt = "the patient: "
        sentence = SentenceModel(
            (Pooling(("mean",), include_prompt=include_prompt), Normalize()),
            prompts={"query": prompt}, default_prompt_name="query",
        )  # fmt: skip
        prompted = Embedder(embedder.model, embedder.tokenizer, sentence=sentence)
        with client_of(prompted) as client:
            endpoints_of(prompted, "tiny", 128)[0][0].warm_up([64])
            compiled = prompted._embed._jitted._cache_size()
            response = client.post("/v1/embeddings", json={"input": "no fever"})
            want = prompted.encode("no fever")
            np.testing.assert_allclose(vectors_of(response)[0], want, atol=2e-6)
            tokens = len(embedder.tokenizer(prompt + "no fever")["input_ids"])
            assert response.json()["usage"]["prompt_tokens"] == tokens
            assert prompted._embed._jitted._cache_size() == compiled

    @pytest.mark.parametrize(
        "body, status, match",
        [
            ({}, 400, "input: expected a text or a list"),
            ({"input": []}, 400, "input: expected a text or a list"),
            ({"input": [[]]}, 400, "input: expected a text, .* none of them empty"),
            ({"input": ["a", [1]]}, 400, "input: expected a text, a list of texts, token ids"),
            ({"input": [5, True]}, 400, "token ids from 0 to 299"),
            ({"input": [300]}, 400, "token ids from 0 to 299"),
            ({"input": ["\ud800"]}, 400, "the tokenizer cannot read"),
            ({"input": "a", "encoding_format": "int8"}, 400, "expected float or base64"),
            ({"input": "a", "dimensions": 0}, 400, "dimensions: expected a whole number from 1 to"),
            ({"input": "a", "dimensions": True}, 400, "dimensions"),
            ({"input": "a", "truncate": 1}, 400, "truncate: expected true or false"),
            ({"input": "a", "normalise": True}, 400, "expected the fields .*, got normalise"),
            ({"input": "a", SECRET: True}, 400, "expected the fields .*, got another one"),
            ({"input": "a", "model": SECRET}, 404, "model: expected tiny"),
            ({"input": ["a"] * 2049}, 413, "at most 2,048 texts"),
        ],
    )
    def test_what_is_refused(self, embed, body, status, match):
        headers = {"Content-Type": "application/json"}
        response = embed.post("/v1/embeddings", content=json.dumps(body), headers=headers)
        refused(response, status, match)

    @pytest.mark.parametrize("body", ["", "[1", "[]", '{"input": NaN}', '{"a": 1, "a": 2}'])
    def test_a_body_that_is_no_object(self, embed, body):
        headers = {"Content-Type": "application/json"}
        refused(embed.post("/v1/embeddings", content=body, headers=headers), 400, "expected a ")


class TestOtherEndpoints:
    def test_classify_equals_the_pipeline(self, folders, classify):
        pipe, texts = runner_of(folders / "classifier"), texts_of(9)
        want = pipe(texts, top_k=None)
        got = classify.post("/classify", json={"inputs": texts}).json()
        for a, b in zip(got, want, strict=True):
            assert [label["label"] for label in a] == [label["label"] for label in b]
            np.testing.assert_allclose([x["score"] for x in a], [x["score"] for x in b], atol=1e-5)
        pair = {"text": "a rash", "text_pair": "no fever"}
        got = classify.post("/classify", json={"inputs": pair, "top_k": 1}).json()
        (best,) = pipe(pair, top_k=1)
        assert len(got) == 1 and got[0]["label"] == best["label"]
        np.testing.assert_allclose(got[0]["score"], best["score"], atol=1e-5)
        refused(classify.post("/classify", json={"inputs": [["a", "b"]]}), 400, "expected texts or")

    def test_rerank_equals_the_reranker(self, folders, tmp_path):
        """With the activation, the prompt and the length of the files, which /classify ignores."""
        shutil.copytree(folders / "reranker", tmp_path / "m")
        settings = {"activation_fn": "torch.nn.Tanh", "prompts": {"task": "judge the patient: "},
                    "default_prompt_name": "task"}  # fmt: skip
        (tmp_path / "m" / "config_sentence_transformers.json").write_text(json.dumps(settings))
        lengths = {"max_seq_length": 50, "do_lower_case": True}
        (tmp_path / "m" / "sentence_bert_config.json").write_text(json.dumps(lengths))
        args = cli.parser().parse_args([str(tmp_path / "m"), "--batch-tokens", "128"])
        pipe, beside = cli.load(args)
        texts, query = texts_of(7, longest=30), "FEVER today"
        own = Reranker.from_pretrained(tmp_path / "m")
        want = own.predict([(query, text) for text in texts])
        plain = pipe([{"text": query, "text_pair": text} for text in texts])
        assert np.abs(want - [item["score"] for item in plain]).min() > 1e-3
        order = np.argsort(-want, kind="stable")
        tokens = [len(own.tokenizer("judge the patient: fever today", text)["input_ids"])
                  for text in texts]  # fmt: skip
        with client_of(pipe, reranker=beside) as client:
            body = {"query": query, "documents": texts, "top_n": 4, "return_documents": True}
            answer = client.post("/rerank", json=body | {"truncate": True}).json()
            found = answer["results"]
            assert [line["index"] for line in found] == order[:4].tolist()
            scores = [line["relevance_score"] for line in found]
            np.testing.assert_allclose(scores, want[order[:4]], atol=1e-5)
            assert [x["document"]["text"] for x in found] == [texts[i] for i in order[:4]]
            assert answer["usage"]["total_tokens"] == sum(min(n, 50) for n in tokens)
            assert max(tokens) > 50
            refused(client.post("/rerank", json=body), 413, "at most 50 tokens per text")
            body = {"query": query, "texts": texts, "truncate": True}
            found = client.post("/rerank", json=body).json()
            assert [set(line) for line in found] == [{"index", "score"}] * 7
            assert [line["index"] for line in found] == order.tolist()
            both = {"query": query, "texts": texts, "documents": texts}
            refused(client.post("/rerank", json=both), 400, "documents, texts: expected one")
            refused(client.post("/rerank", json={"query": 1, "texts": ["a"]}), 400, "query: ")
            got = client.post("/classify", json={"inputs": "FEVER"}).json()
            np.testing.assert_allclose(got[0]["score"], pipe("FEVER")[0]["score"], atol=1e-6)
        compiled = pipe._run._jitted._cache_size()
        for endpoint in endpoints_of(pipe, "tiny", 128, beside)[0]:
            endpoint.warm_up([128])
        assert pipe._run._jitted._cache_size() <= compiled + 1  # /rerank runs the same programs

    def test_a_cross_encoder_of_sentence_transformers_is_no_embedder(self, folders, tmp_path):
        Reranker.from_pretrained(folders / "reranker").save(tmp_path / "m")
        runner, reranker = cli.load(cli.parser().parse_args([str(tmp_path / "m")]))
        assert isinstance(runner, TextClassification) and isinstance(reranker, Reranker)
        for name in ("classifier", "encoder", "mlm"):
            assert cli.load(cli.parser().parse_args([str(folders / name)]))[1] is None

    def test_fill_mask_equals_the_pipeline(self, folders):
        pipe = runner_of(folders / "mlm")
        texts = ["no [MASK]", "the [MASK] has [MASK]", *(text + " [MASK]" for text in texts_of(5))]
        many = "[MASK] " * 20
        with client_of(pipe) as client:
            got = client.post("/fill-mask", json={"inputs": texts, "top_k": 2}).json()
            assert json.dumps(rounded(got)) == json.dumps(rounded(pipe(texts, top_k=2)))
            got = client.post("/fill-mask", json={"inputs": many, "targets": ["pain"]}).json()
            want = pipe(many, targets=["pain"])
            assert len(got) == 20 and json.dumps(rounded(got)) == json.dumps(rounded(want))
            refused(client.post("/fill-mask", json={"inputs": "no"}), 400, "in place of a word")

    def test_what_a_model_does_not_answer(self, embed, classify, folders):
        for client, here in ((embed, {"/v1/embeddings"}), (classify, {"/classify"})):
            for path in set(PATHS) - here:
                error = refused(client.post(path, json={}), 404, f"^{path}: ")
                assert error["code"] == "endpoint_not_served"
        refused(classify.post("/rerank", json={}), 404, "one label, this model has 3")
        refused(embed.post("/nothing"), 404, "Not Found")
        refused(embed.get("/v1/embeddings"), 405, "Method Not Allowed")

    def test_the_checkpoint_decides_the_task(self, folders, tmp_path):
        names = {"encoder": "embed", "mlm": "fill-mask", "classifier": "text-classification"}
        for name, task in names.items():
            assert task_of(read_class(folders / name)) == task
        with pytest.raises(ValueError, match="got a ModernBertForMultipleChoice"):
            task_of(read_class(folders / "choice"))
        model = ModernBertForMaskedLM.from_pretrained(folders / "mlm")
        save_orbax(
            tmp_path / "orbax", architecture="ModernBertForMaskedLM", config=model.config,
            params=flatten(model), optimizer=None, tokenizer_dir=folders / "mlm",
        )  # fmt: skip
        assert read_class(tmp_path / "orbax") is ModernBertForMaskedLM


def rounded(found):
    """The same structure with scores of three digits."""
    if isinstance(found, dict):
        return {k: float(f"{v:.2e}") if k == "score" else v for k, v in found.items()}
    return [rounded(item) for item in found]


class TestWhoMayAsk:
    def test_a_token(self, embedder):
        token = "0123456789abcdef"
        with client_of(embedder, token=token) as client:
            for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": token}):
                for path in ("/v1/embeddings", "/metrics"):
                    call = client.get if path == "/metrics" else client.post
                    error = refused(call(path, headers=header), 401, "Authorization: Bearer")
                    assert error["type"] == "authentication_error"
            headers = {"Authorization": f"Bearer {token}", "Host": "server.example"}
            response = client.post("/v1/embeddings", json={"input": "a"}, headers=headers)
            assert response.status_code == 200
            assert client.get("/health").json() == {"status": "ok"}
            assert client.get("/metrics", headers=headers).status_code == 200

    def test_without_one_only_this_machine(self, embed):
        for host in ("evil.example", "127.0.0.1.evil.example", "[", "10.0.0.1"):
            response = embed.post("/v1/embeddings", json={"input": "a"}, headers={"Host": host})
            refused(response, 403, "Host: expected localhost")
        for host in ("localhost:80", "127.0.0.1", "[::1]:8000"):
            response = embed.post("/v1/embeddings", json={"input": "a"}, headers={"Host": host})
            assert response.status_code == 200
        # What a page in a browser may send without asking.
        headers = {"Content-Type": "text/plain"}
        response = embed.post("/v1/embeddings", content='{"input": "a"}', headers=headers)
        refused(response, 415, "application/json")

    def test_a_host_that_others_reach_needs_a_token(self, capsys, folders):
        for host in ("0.0.0.0", "::", "192.168.0.1", "server.example"):
            with pytest.raises(ValueError, match="expected a loopback address without a token"):
                cli.token_of({}, host)
            assert cli.token_of({cli.TOKEN: "x" * 16}, host) == "x" * 16
        for host in ("127.0.0.1", "127.0.0.9", "::1", "localhost"):
            assert cli.token_of({}, host) is None
        for token in ("", "short", "with a space in it", "é" * 20):
            with pytest.raises(ValueError, match="at least 16 printable"):
                cli.token_of({cli.TOKEN: token}, "localhost")
        assert cli.main([str(folders / "encoder"), "--host", "0.0.0.0"]) == 2
        assert capsys.readouterr().err.startswith("error: host: expected a loopback address")


class Fake(Endpoint):
    """Counts a text as its length, and answers with the text; "poison" raises."""

    path = "/fake"
    param = "inputs"

    def __init__(self):
        self.rows: list[list[str]] = []
        self.started, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def read(self, body):
        return Work("k", body["inputs"], False, lambda found, tokens: {"found": found})

    def count(self, work):
        return [len(value) for value in work.values], 0

    def run(self, key, values):
        self.rows.append(list(values))
        self.started.set()
        assert self.go_on.wait(30)
        if any("poison" in value for value in values):
            raise RuntimeError(f"no such word: {SECRET}")
        return values


class TestLimits:
    def test_a_full_queue(self):
        fake = Fake()
        fake.go_on.clear()
        limits = Limits(row_tokens=64, queue_tokens=100)
        with client_of([fake], limits) as client, futures(2) as run:
            first = run(client.post, "/fake", json={"inputs": ["a" * 60]})
            assert fake.started.wait(30)
            response = client.post("/fake", json={"inputs": ["b" * 60]})
            assert refused(response, 429, "queue is full")["type"] == "rate_limit_error"
            assert 1 <= int(response.headers["Retry-After"]) <= 60
            second = run(client.post, "/fake", json={"inputs": ["c" * 40]})  # this one still fits
            wait_for(lambda: client.service._batcher.queued_tokens == 100)
            fake.go_on.set()
            assert first.result().status_code == second.result().status_code == 200
            assert client.service._batcher.queued_tokens == 0
            assert client.post("/fake", json={"inputs": ["b" * 60]}).status_code == 200

    def test_too_large(self, embedder):
        limits = Limits(row_tokens=64, queue_tokens=100, body_bytes=1000)
        with client_of(embedder, limits) as client:
            body = {"input": ["a"] * 7}  # each takes 16
            refused(client.post("/v1/embeddings", json=body), 413, "at most 100 tokens in a reque")
            refused(client.post("/v1/embeddings", json={"input": "a" * 1000}), 413, "1,000 bytes")
            parts = (b"x" * 100 for _ in range(20))  # without a Content-Length
            headers = {"Content-Type": "application/json"}
            response = client.post("/v1/embeddings", content=parts, headers=headers)
            refused(response, 413, "1,000 bytes")

    def test_too_many_requests(self):
        fake = Fake()
        fake.go_on.clear()
        with client_of([fake], Limits(64, 1000, requests=1)) as client, futures(1) as run:
            first = run(client.post, "/fake", json={"inputs": ["a"]})
            assert fake.started.wait(30)
            assert client.post("/fake", json={"inputs": ["a"]}).status_code == 429
            fake.go_on.set()
            assert first.result().status_code == 200

    def test_a_timeout_drops_what_waits(self):
        fake = Fake()
        fake.go_on.clear()
        with client_of([fake], Limits(16, 1000, seconds=0.3)) as client:
            response = client.post("/fake", json={"inputs": ["a", "b", "c"]})
            assert refused(response, 504, "no answer within 0.3 s")["code"] == "timeout"
            assert client.service._batcher.queued_tokens == 16  # what is computed now
            fake.go_on.set()
            wait_for(lambda: client.service._batcher.queued_tokens == 0)
            assert fake.rows == [["a"]]

    def test_a_client_that_leaves(self):
        """Its waiting texts are dropped, and another request is answered."""
        fake = Fake()
        fake.go_on.clear()

        async def leave(app) -> list:
            sent, gone = [], asyncio.Event()
            body = json.dumps({"inputs": ["a", "b", "c"]}).encode()
            messages = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive():
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
            scope = {
                "type": "http", "method": "POST", "path": "/fake", "raw_path": b"/fake",
                "query_string": b"", "headers": headers, "server": ("localhost", 80),
                "scheme": "http", "http_version": "1.1", "root_path": "", "client": None,
            }  # fmt: skip
            task = asyncio.ensure_future(app(scope, receive, send))
            while not fake.started.is_set():
                await asyncio.sleep(0.005)
            gone.set()
            await task
            return sent

        with client_of([fake], Limits(16, 1000)) as client:
            sent = asyncio.run(leave(client.service.app))
            assert sent[0]["status"] == 499
            assert client.service._batcher.queued_tokens == 16
            fake.go_on.set()
            assert client.post("/fake", json={"inputs": ["d"]}).json() == {"found": ["d"]}
            assert fake.rows == [["a"], ["d"]]
            assert 'requests_total{path="/fake",status="499"} 1' in client.get("/metrics").text


class TestPoison:
    def test_a_poisoned_request_fails_alone(self, caplog):
        fake = Fake()
        fake.go_on.clear()
        with client_of([fake], Limits(200, 4000)) as client, futures(9) as run:
            first = run(client.post, "/fake", json={"inputs": ["first"]})
            assert fake.started.wait(30)
            good = [run(client.post, "/fake", json={"inputs": [f"text {i}"]}) for i in range(7)]
            bad = run(client.post, "/fake", json={"inputs": ["fine", f"poison {SECRET}", "x"]})
            wait_for(lambda: client.service._batcher.queued_tokens >= 16 * 11)
            with caplog.at_level(logging.DEBUG):
                fake.go_on.set()
                refused(bad.result(), 500, "this request failed in the server")
                answers = [future.result().json() for future in (first, *good)]
            assert answers[1:] == [{"found": [f"text {i}"]} for i in range(7)]
            assert len(fake.rows[1]) == 10  # they shared a row before
            assert "zebra" not in caplog.text
            assert re.search(r"/fake: RuntimeError at test_serve.py:\d+", caplog.text)
            assert client.post("/fake", json={"inputs": ["later"]}).status_code == 200

    def test_an_answer_that_is_no_json(self, embedder, monkeypatch):
        encode = Embedder.encode
        monkeypatch.setattr(Embedder, "encode", lambda *a, **k: encode(*a, **k) * np.nan)
        with client_of(embedder) as client:
            refused(client.post("/v1/embeddings", json={"input": "a"}), 500, "failed in the server")


class TestRows:
    """The batcher alone."""

    def rows_of(self, lengths: list[list[int]], row_tokens: int) -> list[list[int]]:
        """The rows, as lengths, of jobs that all wait when the first row is taken."""
        rows: list[list[int]] = []
        go_on = threading.Event()

        def run(key, values):
            assert go_on.wait(30)
            rows.append(list(values))
            return [-value for value in values]

        batcher = Batcher(run, row_tokens, 10**6)
        first = batcher.submit("k", [1], [1])
        wait_for(lambda: not first.waiting)
        jobs = [batcher.submit("k", sizes, sizes) for sizes in lengths]
        go_on.set()
        for job, sizes in zip(jobs, lengths, strict=True):
            assert job.future.result(30) == [-size for size in sizes]
        batcher.close()
        assert batcher.queued_tokens == 0
        return rows[1:]

    def test_the_oldest_first_then_the_longest_that_fit(self):
        rows = self.rows_of([[50], [20, 90], [30, 300]], 100)
        assert rows == [[50, 30, 20], [90], [300]]

    def test_short_texts_take_a_slot_each(self):
        rows = self.rows_of([[1] * 20], 100)
        assert [len(row) for row in rows] == [6, 6, 6, 2]

    def test_every_row_fits_and_no_text_is_lost(self):
        rng = np.random.default_rng(3)
        lengths = [rng.integers(1, 120, rng.integers(1, 9)).tolist() for _ in range(60)]
        rows = self.rows_of(lengths, 128)
        assert sorted(sum(rows, [])) == sorted(sum(lengths, []))
        counted = [sum(max(size, SLOT_TOKENS) for size in row) for row in rows]
        assert max(counted) <= 128
        assert np.mean(counted) > 0.9 * 128

    def test_other_keys_do_not_share_a_row(self):
        rows = []
        go_on = threading.Event()

        def run(key, values):
            assert go_on.wait(30)
            rows.append((key, list(values)))
            return values

        batcher = Batcher(run, 100, 1000)
        jobs = [batcher.submit(key, [n], [20]) for n, key in enumerate("aabab")]
        go_on.set()
        for job in jobs:
            job.future.result(30)
        batcher.close()
        assert all(len({"aabab"[n] for n in values}) == 1 for _, values in rows)
        assert sum(len(values) for _, values in rows) == 5

    def test_what_waits_of_a_failed_request_is_not_computed(self):
        rows = []

        def run(key, values):
            rows.append(list(values))
            if "bad" in values:
                raise ValueError
            return values

        batcher = Batcher(run, 16, 1000)
        job = batcher.submit("k", ["bad", *"abcd"], [16] * 5)
        with pytest.raises(ValueError):
            job.future.result(30)
        assert batcher.submit("k", ["later"], [16]).future.result(30) == ["later"]
        batcher.close()
        assert rows == [["bad"], ["later"]]
        assert batcher.queued_tokens == 0

    def test_close_computes_what_waits(self):
        go_on = threading.Event()
        batcher = Batcher(lambda key, values: go_on.wait(30) and values, 16, 1000)
        jobs = [batcher.submit("k", ["a", "b"], [9, 9]) for _ in range(5)]
        closing = threading.Thread(target=batcher.close)
        closing.start()
        wait_for(lambda: batcher._closed)
        with pytest.raises(Closed):
            batcher.submit("k", ["c"], [9])
        go_on.set()
        closing.join(30)
        assert [job.future.result(0) for job in jobs] == [["a", "b"]] * 5
        assert not batcher.alive

    def test_retry_after_follows_the_speed(self):
        batcher = Batcher(lambda key, values: time.sleep(0.05) or values, 20, 100)
        batcher.submit("k", ["a"], [20]).future.result(30)
        go_on = batcher.submit("k", ["b"] * 5, [20] * 5)
        with pytest.raises(QueueFull) as full:
            batcher.submit("k", ["c"] * 5, [20] * 5)
        assert full.value.seconds == 1  # a quarter of a second, rounded up
        go_on.future.result(30)
        batcher.close()

    def test_one_program_per_length(self, folders, embedder):
        """After a warm-up no mixture of texts compiles anything."""
        lengths = cli.warm_up_lengths(None, 128)
        assert lengths == [64, 80, 96, 112, 128]
        assert cli.warm_up_lengths([], 128) == [] and cli.warm_up_lengths([65], 128) == [80]
        pipe = runner_of(folders / "mlm")
        for runner, function in ((embedder, embedder._embed), (pipe, pipe._run)):
            endpoints, _ = endpoints_of(runner, "tiny", 128)
            endpoints[0].warm_up(lengths)
            compiled = function._jitted._cache_size()
            with client_of(runner) as client:
                for count, longest in ((1, 3), (3, 4), (5, 3), (30, 3), (40, 20), (12, 60)):
                    texts = [text + " [MASK]" for text in texts_of(count, longest=longest)]
                    name = "input" if runner is embedder else "inputs"
                    response = client.post(endpoints[0].path, json={name: texts})
                    assert response.status_code == 200
            assert function._jitted._cache_size() == compiled


class TestConcurrent:
    def test_many_clients_get_their_own_vectors(self, embedder):
        texts = texts_of(96, seed=7)
        want = embedder.encode(texts)
        with client_of(embedder) as client, futures(16) as run:
            answers = [run(client.post, "/v1/embeddings", json={"input": text}) for text in texts]
            got = np.concatenate([vectors_of(answer.result()) for answer in answers])
            np.testing.assert_allclose(got, want, atol=2e-6)
            metrics = client.get("/metrics").text
        values = {}
        for family in prometheus_client.parser.text_string_to_metric_families(metrics):
            for sample in family.samples:
                values[sample.name, sample.labels.get("le")] = sample.value
        assert values["modernbert_jax_texts_total", None] == 96
        assert values["modernbert_jax_rows_total", None] < 96  # they shared rows
        assert values["modernbert_jax_queue_tokens", None] == 0
        assert values["modernbert_jax_request_seconds_count", None] == 96
        assert values["modernbert_jax_request_seconds_bucket", "+Inf"] == 96


@contextlib.contextmanager
def futures(threads: int):
    """A function that calls another in a thread and returns a future."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as pool:
        yield pool.submit


def wait_for(condition) -> None:
    """Waits until something that another thread does is done; a hang ends in the test's failure."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen")


@contextlib.contextmanager
def process_of(*arguments: str, token: str | None = None):
    """A server in a process of its own: (process, its address)."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    env |= {cli.TOKEN: token} if token else {}
    command = [sys.executable, "-m", "modernbert_jax", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = []
        for line in process.stdout:  # type: ignore[union-attr]
            lines.append(line)
            if found := re.search(r"http://\S+", line):
                break
        else:
            raise AssertionError("".join(lines))
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


class TestProcess:
    def test_sigterm_under_load_loses_no_accepted_request(self, folders, embedder):
        """Every request that the server accepted is answered in full; it says how many."""
        texts = texts_of(200, seed=1)
        want = embedder.encode(texts)
        counts: collections.Counter[str] = collections.Counter()
        finished: list[int] = []

        async def client(address: str, number: int, http: httpx2.AsyncClient) -> None:
            for n in range(number, 10**6, 24):
                index = n % len(texts)
                try:
                    response = await http.post(
                        f"{address}/v1/embeddings", json={"input": texts[index]}
                    )
                except httpx2.TransportError as error:
                    # A request that the server never read; a part of an answer would be a loss.
                    assert not isinstance(error, httpx2.ReadTimeout), repr(error)
                    counts["refused"] += 1
                    return
                counts[str(response.status_code)] += 1
                if response.status_code == 200:
                    np.testing.assert_allclose(vectors_of(response)[0], want[index], atol=2e-6)
                    finished.append(index)

        async def leaver(address: str) -> None:
            """Leaves before the answer, again and again."""
            host, port = address.removeprefix("http://").split(":")
            body = json.dumps({"input": texts[:50]})
            with contextlib.suppress(OSError):
                for _ in range(3):
                    _, writer = await asyncio.open_connection(host, int(port))
                    writer.write(
                        f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nContent-Length: "
                        f"{len(body)}\r\nContent-Type: application/json\r\n\r\n{body}".encode()
                    )
                    await writer.drain()
                    writer.close()

        async def load(process, address: str) -> None:
            async with httpx2.AsyncClient(timeout=None) as http:
                clients = [asyncio.ensure_future(client(address, n, http)) for n in range(24)]
                await leaver(address)
                while len(finished) < 60:
                    await asyncio.sleep(0.01)
                    for task in clients:
                        if task.done():
                            task.result()
                process.send_signal(signal.SIGTERM)
                await asyncio.gather(*clients)

        folder = str(folders / "encoder")
        with process_of(folder, "--warm-up", "--batch-tokens", "128", "--timeout", "3600") as (
            process,
            address,
        ):
            asyncio.run(load(process, address))
            rest = process.stdout.read()
            assert process.wait(60) == 0, rest
        answered, accepted = map(int, re.findall(r"answered (\d+) of (\d+) accepted", rest)[0])
        assert answered == accepted
        left = accepted - counts["200"]
        assert 0 <= left <= 3, (counts, accepted)  # those of the client that leaves
        assert set(counts) <= {"200", "503", "refused"} and counts["200"] >= 60
        assert not re.search("patient|fever|cough|denies", rest), rest

    def test_the_first_answer_with_a_cache_and_exported_functions(self, folders, tmp_path):
        exported, cache = tmp_path / "exported", tmp_path / "cache"
        Embedder.from_pretrained(folders / "encoder").export(exported, tokens=[64])
        assert (exported / FUNCTIONS).is_dir()
        arguments = ["--exported", "--compile-cache", str(cache), "--warm-up", "64"]
        token = "a token of these tests"[:16].replace(" ", "-")
        with process_of(str(exported), *arguments, token=token) as (process, address):
            headers = {"Authorization": f"Bearer {token}"}
            body = {"input": "no fever", "model": "exported"}
            response = httpx2.post(f"{address}/v1/embeddings", json=body, headers=headers)
            want = Embedder.from_pretrained(folders / "encoder").encode("no fever")
            np.testing.assert_allclose(vectors_of(response)[0], want, atol=2e-6)
            process.send_signal(signal.SIGINT)
            assert "answered 1 of 1" in process.stdout.read()
            assert process.wait(60) == 0
        assert any(cache.iterdir())

    def test_bad_arguments_are_one_line(self, folders, capsys, tmp_path):
        folder = str(folders / "encoder")
        with contextlib.closing(cli.bind("127.0.0.1", 0)) as taken:
            taken.listen()
            port = str(taken.getsockname()[1])
            for arguments, match in (
                ([folder, "--port", port], f"127.0.0.1:{port}: .*--port"),
                ([str(tmp_path / "none"), "--port", "0"], "expected a checkpoint folder"),
                ([folder, "--port", "0", "--exported"], "exported: expected a local folder with"),
                ([folder, "--queue-tokens", "-1"], "queue_tokens: expected a whole number"),
                ([folder, "--timeout", "0"], "timeout: expected seconds above 0"),
                ([str(folders / "choice"), "--port", "0"], "got a ModernBertForMultipleChoice"),
                ([folder, "--task", "fill-mask", "--port", "0"], "task: expected embed or"),
            ):
                assert cli.main(arguments) == 2
                (line,) = capsys.readouterr().err.splitlines()
                assert line.startswith("error: ") and re.search(match, line), line

    def test_help_and_a_missing_extra(self, capsys, monkeypatch):
        with pytest.raises(SystemExit) as left:
            umbrella.main(["serve", "--help"])
        assert left.value.code == 0
        shown = capsys.readouterr().out
        for word in (*PATHS, cli.TOKEN, "429", "--exported", "--compile-cache"):
            assert word in shown
        for name in [n for n in sys.modules if n.startswith("modernbert_jax.serve")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        assert umbrella.main(["serve", "model"]) == 2
        assert 'needs the extra "serve"' in capsys.readouterr().err
