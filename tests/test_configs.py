"""The recipes have the properties that the papers and the published checkpoints state."""

import dataclasses
import math
import re
from fractions import Fraction

import pytest
import tyro

from modernbert_jax import ModernBertConfig
from train import configs
from train.configs._recipe import large
from train.pretrain.config import Phase, TrainConfig

B = 10**9
NAMES = [name for name in configs.names() if name not in ("demo", "notebook", "continue")]
every_recipe = pytest.mark.parametrize("name", NAMES)

# Published numbers, not taken from train/configs. For each phase of a run: tokens and epochs of its
# corpora (billions), masked share, tokens of warm-up, share of the budget that decays.
# Sources: arXiv 2412.13663, table 3; the model card of BioClinical ModernBERT.
BIO_PHASE1 = (53.4843, 3, 0.30, 0, 0)
BIO_PHASE2 = (50.735, 1, 0.15, 0, 1)
CLINICAL = (2.749112, 3, 0.15, 0)
PHASES = {
    "bioclinical_base": [BIO_PHASE1, (*CLINICAL, 1)],
    "bioclinical_large": [BIO_PHASE1, (*CLINICAL, Fraction(1, 3))],  # the last of 3 epochs
    "bio_base": [BIO_PHASE1, BIO_PHASE2],
    "bio_large": [BIO_PHASE1, BIO_PHASE2],
    "modernbert_base_pretrain": [(1719, 1, 0.30, 3 * B, 0)],
    "modernbert_large_pretrain": [(900, 1, 0.30, 2 * B, 0), (819, 1, 0.30, 0, 0)],
    "modernbert_base_context": [(250, 1, 0.30, 0, 0)],
    "modernbert_large_context": [(250, 1, 0.30, 0, 0)],
    "modernbert_base_decay": [(50, 1, 0.30, 0, 1)],
    "modernbert_large_decay": [(50, 1, 0.30, 0, 1)],
}
# Peak learning rates of pretraining and of all later phases, weight decay then and later, seed.
TRAINING = {
    "base": ([8e-4], 3e-4, 1e-5, 1e-5, 17),
    "large": ([5e-4, 5e-5], 5e-5, 1e-5, 1e-6, 314),
}
# The steps of the published checkpoints: the numbers in the names of their files.
CHECKPOINTS = {"modernbert_base_context": 52_988, "modernbert_large_context": 49_552}
# Sequences of the first steps, and the tokens after which steps have their full size.
BATCH_SIZE_WARMUP = {
    "modernbert_base_pretrain": (768, 50 * B),
    "modernbert_large_pretrain": (448, 10 * B),
}


def size_of(name: str) -> str:
    return "large" if "large" in name else "base"


def published_rate(tokens, budget, peak, warmup, decay) -> float:
    """1e-10 -> 1 over the warm-up, 1, then max(0.001, 0.001 + 0.999 (1 - sqrt(x)))."""
    if tokens < warmup:
        return peak * (1e-10 + (1 - 1e-10) * tokens / warmup)
    if not decay or tokens <= budget - decay:
        return peak
    x = Fraction(tokens - (budget - decay), decay)
    return peak * max(0.001, 0.001 + (1 - 0.001) * (1 - math.sqrt(x)))


def steps_of(config: TrainConfig, phase: Phase) -> float:
    """Steps of a phase without padding: step by step during the batch-size warm-up."""
    steps = tokens = 0
    while tokens < phase.batch_size_warmup_tokens:
        sequences = phase.batch_size_at(
            tokens, config.global_batch_size, config.micro_batch_size
        )  # fmt: skip
        tokens += sequences * config.sequence_length
        steps += 1
    return steps + (phase.tokens - tokens) / (config.global_batch_size * config.sequence_length)


def test_every_recipe_is_in_the_tables():
    assert set(NAMES) == set(PHASES)


@every_recipe
class TestRecipe:
    def test_is_valid_and_documented(self, name):
        configs.load(name).validate()
        text = configs.describe(name)
        for word in ("Source:", "Hardware:", "Hours", "Expect:", f"--config {name}"):
            assert word in text, word

    def test_token_budgets(self, name):
        phases = configs.load(name).phases
        for phase, published in zip(phases, PHASES[name], strict=True):
            billions, epochs, masked, warmup, decaying = published
            assert phase.tokens == pytest.approx(billions * epochs * B, rel=1e-5)
            assert phase.mlm_probability == masked
            assert phase.warmup_tokens == warmup
            assert phase.decay_tokens == pytest.approx(phase.tokens * float(decaying), rel=1e-6)

    def test_number_of_steps(self, name):
        """As the docstring promises and, where a checkpoint is published, as its name says."""
        config = configs.load(name)
        steps = [steps_of(config, phase) for phase in config.phases]
        expect = configs.describe(name).partition("Expect:")[2]
        promised = re.match(r" about ([\d,]+)(?: and ([\d,]+))? steps", expect)
        assert promised, expect
        numbers = [int(number.replace(",", "")) for number in promised.groups() if number]
        found = steps if len(numbers) > 1 else [sum(steps)]
        assert found == pytest.approx(numbers, rel=2e-3)
        if name in CHECKPOINTS:
            assert sum(steps) == pytest.approx(CHECKPOINTS[name], rel=3e-4)

    def test_tokens_per_step(self, name):
        """4.7 and 5.0 million; on 8 GPUs each of a step's micro-batches is equally large."""
        config = configs.load(name)
        assert config.sequence_length == (1024 if "pretrain" in name else 8192)
        tokens = config.global_batch_size * config.sequence_length
        published = 4608 * 1024 if size_of(name) == "base" else 4928 * 1024
        assert tokens == published or name == "modernbert_large_decay"
        assert tokens == pytest.approx(published, rel=0.015)
        assert config.global_batch_size % (8 * config.gradient_accumulation_steps) == 0

    def test_optimizer(self, name):
        config, optimizer = configs.load(name), configs.load(name).optimizer
        first_rates, later, first_decay, later_decay, seed = TRAINING[size_of(name)]
        pretraining = "pretrain" in name
        rates = [phase.learning_rate for phase in config.phases]
        assert rates == (first_rates if pretraining else [later] * len(rates))
        assert optimizer.weight_decay == (first_decay if pretraining else later_decay)
        assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.98, 1e-6)
        assert config.seed == seed

    def test_schedule_follows_the_published_formula(self, name):
        for phase in configs.load(name).phases:
            warmup, decay, budget = phase.warmup_tokens, phase.decay_tokens, phase.tokens
            start = budget - decay
            clock = [0, warmup // 3, warmup - 1, warmup, start - 1, start, start + decay // 4]
            clock += [start + decay // 2, budget - 1, budget, budget + 4_000_000]
            rate, peak = phase.learning_rate_at, phase.learning_rate
            for tokens in (max(t, 0) for t in clock):
                want = published_rate(min(tokens, budget), budget, peak, warmup, decay)
                assert rate(tokens) == pytest.approx(want, rel=1e-6, abs=1e-9 * peak), tokens

    def test_model(self, name):
        model = configs.load(name).model
        preset = getattr(ModernBertConfig, size_of(name))()
        theta = 10_000 if "pretrain" in name else 160_000
        assert model == preset.replace(
            global_rope_theta=theta, local_rope_theta=10_000, dtype="bfloat16",
            param_dtype="float32", residual_dtype="float32", attention_out_dropout=0.1,
        )  # fmt: skip

    def test_start(self, name):
        """Runs after the first one continue with its moments; one of them changes theta."""
        config = configs.load(name)
        fresh = name.endswith("_pretrain")
        assert bool(config.init_from) == config.init_optimizer == (not fresh)
        assert config.global_rope_theta == (160_000 if name.endswith("_context") else None)
        before = {"context": "pretrain"}.get(name.rpartition("_")[2], "context")
        assert fresh or config.init_from == f"./checkpoints/{size_of(name)}_{before}"
        assert config.workdir == f"runs/{name}"

    def test_quirks_are_off(self, name):
        config = configs.load(name)
        assert config.loss_weighting == "tokens"
        assert not config.mask_special_tokens
        assert config.eval_mlm_probability == 0.15


def test_weight_decay_of_a_step_follows_the_roll_back():
    config = configs.load("modernbert_large_pretrain")
    peak = config.optimizer.max_learning_rate
    decays = [p.learning_rate / peak * config.optimizer.weight_decay for p in config.phases]
    assert decays == pytest.approx([1e-5, 1e-6])


class TestBatchSizeWarmup:
    def test_only_pretraining_has_one(self):
        found = {
            name: (phase.batch_size_warmup_start, phase.batch_size_warmup_tokens)
            for name in NAMES
            for phase in configs.load(name).phases
            if phase.batch_size_warmup_start or phase.batch_size_warmup_tokens
        }
        assert found == BATCH_SIZE_WARMUP
        assert Phase().batch_size_at(0, 576, 96) == 576

    @pytest.mark.parametrize("name", BATCH_SIZE_WARMUP)
    def test_every_size_has_equally_many_steps(self, name):
        """Without padding, sizes rise by one micro-batch and each is used equally long."""
        config = configs.load(name)
        phase, full, micro = config.phases[0], config.global_batch_size, config.micro_batch_size
        steps: dict[int, int] = {}
        tokens = 0
        while tokens < BATCH_SIZE_WARMUP[name][1]:
            size = phase.batch_size_at(tokens, full, micro)
            steps[size] = steps.get(size, 0) + 1
            tokens += size * config.sequence_length
        sizes = list(steps)
        assert sizes[0] == BATCH_SIZE_WARMUP[name][0] and sizes[-1] == full
        assert {b - a for a, b in zip(sizes, sizes[1:], strict=False)} == {micro}
        assert max(steps.values()) - min(steps.values()) <= 2
        assert phase.batch_size_at(tokens, full, micro) == full

    @pytest.mark.parametrize("name", BATCH_SIZE_WARMUP)
    def test_thresholds(self, name):
        """ceil(W cumsum(sizes) / sum(sizes)), in exact fractions."""
        config = configs.load(name)
        full, micro = config.global_batch_size, config.micro_batch_size
        first, by = BATCH_SIZE_WARMUP[name]
        sizes = list(range(first, full + 1, first))
        for k, size in enumerate(sizes[:-1]):
            threshold = math.ceil(Fraction(by * sum(sizes[: k + 1]), sum(sizes)))
            at = [config.phases[0].batch_size_at(threshold - d, full, micro) for d in (1, 0)]
            assert at == [size, sizes[k + 1]]


@pytest.mark.parametrize(
    "name, unit, size",
    [("bioclinical_base", 64, 576), ("bioclinical_base", 256, 512), ("bio_large", 64, 640),
     ("bio_large", 1024, 1024), ("modernbert_base_pretrain", 256, 4608),
     ("modernbert_large_pretrain", 64 * 88, 64 * 88)],
)  # fmt: skip
def test_rounded_batches(name, unit, size):
    """The nearest multiple; rates by the square root; what follows is still a valid recipe."""
    config = configs.load(name)
    found, line = config.rounded(unit)
    assert found.global_batch_size == size
    ratio = size / config.global_batch_size
    for old, new in zip(config.phases, found.phases, strict=True):
        assert new.learning_rate == pytest.approx(old.learning_rate * ratio**0.5, rel=1e-12)
        assert new.tokens == old.tokens
        assert bool(new.batch_size_warmup_start) == bool(old.batch_size_warmup_start)
    rates = [c.optimizer.max_learning_rate or 0.0 for c in (config, found)]
    assert rates[1] == pytest.approx(rates[0] * ratio**0.5)
    found.validate()
    assert f"{size} sequences per step instead of {config.global_batch_size}" in line
    assert f"{size * config.sequence_length:,} tokens" in line and f"x {ratio**0.5:.4f}" in line


def test_large_applies_changes_last():
    base = configs.load("bioclinical_base")
    made = large(base, seed=3)
    assert made.model == base.model.replace(
        hidden_size=1024, intermediate_size=2624, num_hidden_layers=28, num_attention_heads=16
    )
    assert (made.seed, made.global_batch_size) == (3, 616)
    assert dataclasses.replace(made.phases[0], learning_rate=3e-4) == base.phases[0]


def test_an_unknown_name_is_one_line():
    with pytest.raises(ValueError, match="config: expected one of bio_base, .*got 'nothing'"):
        configs.load("nothing")
    with pytest.raises(ValueError, match="got '__init__'"):
        configs.describe("__init__")


def test_the_flags_of_the_quirks_are_fields():
    """The flags that the docstring names turn each quirk on."""
    args = [
        "--loss-weighting", "sequences", "--mask-special-tokens",
        "--optimizer.max-learning-rate", "8e-4", "--no-init-optimizer",
        "--phases.0.corpus", "BIOMEDICAL", "CLINICAL", "--phases.1.corpus", "CLINICAL",
    ]  # fmt: skip
    default = configs.load("bioclinical_base")
    config = tyro.cli(TrainConfig, args=args, default=default)
    assert config.loss_weighting == "sequences" and config.mask_special_tokens
    assert config.optimizer.max_learning_rate == 8e-4 and not config.init_optimizer
    assert [phase.corpus for phase in config.phases] == [("BIOMEDICAL", "CLINICAL"), ("CLINICAL",)]
    text = configs.describe("bioclinical_base")
    assert all(arg in text for arg in args if arg.startswith("--"))
