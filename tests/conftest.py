"""Settings that must be in place before jax is imported, and the fixtures that many files use."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu is installed to compile for absent TPUs. Without this it queries a cloud metadata server.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
# No test may download from the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# `make test` has a process per core: torch's threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tokenizers warn, and may deadlock, if a process forks after using them in parallel.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A program is compiled once: tests, the processes that they start and the next run share a cache.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Eight devices, so that the sharding tests run everywhere.
jax.config.update("jax_num_cpu_devices", 8)
# A silent broadcast between ranks hides a missing axis.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling takes longer than any deadline. The examples are fixed, so that CI is repeatable.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    """Turns XLA's fusion emitters off where no test marked `optimized` runs.

    Programs then compile in a third of the time. A process reads these flags once, so the Makefile
    runs the tests marked `optimized` in processes of their own. jax 0.12 has no such flag.
    """
    if "not optimized" in config.option.markexpr and jax.__version_info__ < (0, 11):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
        os.environ["XLA_FLAGS"] = flags.strip()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiles with few of XLA's optimizations in most tests.

    Those marked `optimized`, among them all that compare whole models with torch, compile as users
    do. Processes that a test starts follow it.
    """
    quick = item.get_closest_marker("optimized") is None
    os.environ[QUICK] = str(int(quick))
    jax.config.update(QUICK.lower(), quick)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real corpora beside the checkout. Skips the test if there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no folder `shared` beside the checkout")
    return folder


@pytest.fixture(scope="session")
def cuda_compiler() -> Path:
    """The folder of the CUDA compiler for absent GPUs, installed if it is missing."""
    root = Path(__file__).resolve().parents[1]
    folder = root / ".venv-h100" / f"jax-{jax.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be installing it
        if not any(folder.glob("jax_cuda*_plugin-*.dist-info")):
            command = [sys.executable, "-m", "train.plan.install_cuda", "--target", str(folder)]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True)
            if done.returncode and not os.environ.get("CI"):  # CI has a package index
                pytest.skip(f"pip could not install the CUDA compiler: {done.stderr[-200:]}")
            assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="session")
def small_tokenizer():
    """A byte-level BPE of 300 tokens with ModernBERT's special tokens. It encodes any text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    from modernbert_jax.tokenizer import from_backend

    bpe = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    words = ["the patient has no fever, denies cough and pain; seen today with a rash"] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False,
        special_tokens=["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(words, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )  # fmt: skip
    return from_backend(bpe)
