"""The recipes: every published number, their schedules and the warm-up of the rows."""

import importlib
import math
import pkgutil
from fractions import Fraction

import pytest

from modernbert_jax import ModernBertConfig
from train import configs
from train.common.optimizer import schedule
from train.pretrain.config import Phase, TrainConfig

B = 10**9

# Typed from the published training configurations, not from train/configs. One line a phase:
# tokens, mask rate, learning rate, tokens of warm-up and of decay, steps at full rows.
PHASES = {
    "bioclinical_base": [
        (160_453_000_000, 0.30, 3e-4, 0, 0, 34_004),
        (8_247_337_000, 0.15, 3e-4, 0, 8_247_337_000, 1_748),
    ],
    "bioclinical_large": [
        (160_453_000_000, 0.30, 5e-5, 0, 0, 31_796),
        (8_247_337_000, 0.15, 5e-5, 0, 2_749_112_000, 1_634),
    ],
    "bio_base": [
        (160_453_000_000, 0.30, 3e-4, 0, 0, 34_004),
        (50_735_000_000, 0.15, 3e-4, 0, 50_735_000_000, 10_752),
    ],
    "bio_large": [
        (160_453_000_000, 0.30, 5e-5, 0, 0, 31_796),
        (50_735_000_000, 0.15, 5e-5, 0, 50_735_000_000, 10_054),
    ],
    "modernbert_base_pretrain": [(1719 * B, 0.30, 8e-4, 3 * B, 0, 364_304)],
    "modernbert_large_pretrain": [
        (900 * B, 0.30, 5e-4, 2 * B, 0, 178_349),
        (819 * B, 0.30, 5e-5, 0, 0, 162_298),
    ],
    "modernbert_base_context": [(250 * B, 0.30, 3e-4, 0, 0, 52_982)],
    "modernbert_large_context": [(250 * B, 0.30, 5e-5, 0, 0, 49_542)],
    "modernbert_base_decay": [(50 * B, 0.30, 3e-4, 0, 50 * B, 10_596)],
    "modernbert_large_decay": [(50 * B, 0.30, 5e-5, 0, 50 * B, 9_781)],
}

# rows, of them at a time on each of 8 GPUs, row length, weight decay, seed, theta global / local
RUNS = {
    "bioclinical_base": (576, 12, 8192, 1e-5, 17, 160_000, 10_000),
    "bioclinical_large": (616, 7, 8192, 1e-6, 314, 160_000, 10_000),
    "bio_base": (576, 12, 8192, 1e-5, 17, 160_000, 10_000),
    "bio_large": (616, 7, 8192, 1e-6, 314, 160_000, 10_000),
    "modernbert_base_pretrain": (4608, 96, 1024, 1e-5, 17, 10_000, 10_000),
    "modernbert_large_pretrain": (4928, 56, 1024, 1e-5, 314, 10_000, 10_000),
    "modernbert_base_context": (576, 12, 8192, 1e-5, 17, 160_000, 10_000),
    "modernbert_large_context": (616, 7, 8192, 1e-6, 314, 160_000, 10_000),
    "modernbert_base_decay": (576, 12, 8192, 1e-5, 17, 160_000, 10_000),
    "modernbert_large_decay": (624, 6, 8192, 1e-6, 314, 160_000, 10_000),
}

# first rows, and the tokens by when all are in use
ROWS_WARMUP = {
    "modernbert_base_pretrain": (768, 50 * B),
    "modernbert_large_pretrain": (448, 10 * B),
}


def config_of(name: str) -> TrainConfig:
    return importlib.import_module(f"train.configs.{name}").get_config()


def published_rate(tokens, budget, peak, warmup, decay) -> float:
    """1e-10 -> 1 over the warm-up, 1, then max(0.001, 0.001 + 0.999 (1 - sqrt(x)))."""
    if tokens < warmup:
        return peak * (1e-10 + (1 - 1e-10) * tokens / warmup)
    if not decay or tokens <= budget - decay:
        return peak
    x = Fraction(tokens - (budget - decay), decay)
    return peak * max(0.001, 0.001 + (1 - 0.001) * (1 - math.sqrt(x)))


def test_every_config_is_in_the_tables():
    names = {module.name for module in pkgutil.iter_modules(configs.__path__)}
    assert names - {"demo", "notebook"} == set(PHASES) == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
class TestRecipe:
    def test_is_valid_and_documented(self, name):
        config_of(name).validate()
        text = importlib.import_module(f"train.configs.{name}").__doc__ or ""
        for word in ("Source:", "Hardware:", "Hours", "Expect:", f"--config {name}"):
            assert word in text, word

    def test_numbers_of_the_run(self, name):
        config = config_of(name)
        rows, at_a_time, length, weight_decay, seed, theta, local_theta = RUNS[name]
        assert (config.global_batch_size, config.sequence_length, config.seed) == (
            rows,
            length,
            seed,
        )
        assert config.micro_batch_size == 8 * at_a_time
        assert config.optimizer.weight_decay == weight_decay
        assert (config.optimizer.b1, config.optimizer.b2, config.optimizer.eps) == (0.9, 0.98, 1e-6)
        model = config.model
        assert (model.global_rope_theta, model.local_rope_theta) == (theta, local_theta)
        assert config.eval_mlm_probability == 0.15
        large = "large" in name
        assert model.hidden_size == (1024 if large else 768)
        assert model.num_hidden_layers == (28 if large else 22)
        assert (model.dtype, model.param_dtype, model.residual_dtype) == (
            "bfloat16", "float32", "float32",
        )  # fmt: skip
        dropouts = {f: getattr(model, f) for f in vars(model) if f.endswith("_dropout")}
        assert dropouts.pop("attention_out_dropout") == 0.1
        assert not any(dropouts.values())
        assert model.max_position_embeddings == 8192  # the next run's rows are as long

    def test_quirks_are_off(self, name):
        config = config_of(name)
        assert config.loss_weighting == "tokens"
        assert not config.mask_special_tokens

    def test_numbers_of_the_phases(self, name):
        config = config_of(name)
        assert len(config.phases) == len(PHASES[name])
        for phase, expected in zip(config.phases, PHASES[name], strict=True):
            tokens, mask, rate, warmup, decay, steps = expected
            assert (phase.tokens, phase.mlm_probability, phase.learning_rate) == (
                tokens,
                mask,
                rate,
            )
            assert (phase.warmup_tokens, phase.decay_tokens) == (warmup, decay)
            assert (
                abs(phase.tokens / (config.global_batch_size * config.sequence_length) - steps) < 1
            )
        first = config.phases[0]
        assert (first.batch_size_warmup_start, first.batch_size_warmup_tokens) == ROWS_WARMUP.get(
            name, (0, 0)
        )
        assert not any(phase.batch_size_warmup_start for phase in config.phases[1:])

    def test_start(self, name):
        config = config_of(name)
        fresh = name.endswith("_pretrain")
        assert bool(config.init_from) == config.init_optimizer == (not fresh)
        assert config.global_rope_theta == (160_000 if name.endswith("_context") else 0)

    def test_rates_at_key_tokens(self, name):
        for phase, (budget, _, peak, warmup, decay, _) in zip(
            config_of(name).phases, PHASES[name], strict=True
        ):
            rate = schedule(phase)
            start = budget - decay
            keys = [0, warmup // 3, warmup - 1, warmup, start - 1, start, start + decay // 4]
            keys += [start + decay // 2, budget - 1, budget, budget + 4_000_000]
            for tokens in (max(key, 0) for key in keys):
                want = published_rate(min(tokens, budget), budget, peak, warmup, decay)
                assert rate(tokens) == pytest.approx(want, rel=1e-6, abs=1e-9 * peak), tokens


def test_weight_decay_of_a_step_follows_the_roll_back():
    config = config_of("modernbert_large_pretrain")
    peak = config.optimizer.max_learning_rate
    decays = [p.learning_rate / peak * config.optimizer.weight_decay for p in config.phases]
    assert decays == pytest.approx([1e-5, 1e-6])


@pytest.mark.parametrize("name", ROWS_WARMUP)
class TestRowsWarmup:
    def test_every_size_gets_as_many_steps(self, name):
        """A run of full rows, step by step: sizes rise by one micro-batch and last equally long."""
        config = config_of(name)
        phase = config.phases[0]
        steps: dict[int, int] = {}
        tokens = 0
        while tokens < ROWS_WARMUP[name][1]:
            rows = phase.batch_size_at(tokens, config.global_batch_size, config.micro_batch_size)
            steps[rows] = steps.get(rows, 0) + 1
            tokens += rows * config.sequence_length
        sizes = list(steps)
        assert sizes[0] == ROWS_WARMUP[name][0] and sizes[-1] == config.global_batch_size
        assert {b - a for a, b in zip(sizes, sizes[1:], strict=False)} == {8 * RUNS[name][1]}
        assert max(steps.values()) - min(steps.values()) <= 2
        assert (
            phase.batch_size_at(tokens, config.global_batch_size, config.micro_batch_size)
            == config.global_batch_size
        )

    def test_thresholds(self, name):
        """ceil(W cumsum(sizes) / sum(sizes)), in exact fractions."""
        config = config_of(name)
        phase, (first, by) = config.phases[0], ROWS_WARMUP[name]
        sizes = list(range(first, config.global_batch_size + 1, first))
        for k, size in enumerate(sizes[:-1]):
            threshold = math.ceil(Fraction(by * sum(sizes[: k + 1]), sum(sizes)))
            assert (
                phase.batch_size_at(
                    threshold - 1, config.global_batch_size, config.micro_batch_size
                )
                == size
            )
            assert (
                phase.batch_size_at(threshold, config.global_batch_size, config.micro_batch_size)
                == sizes[k + 1]
            )


def test_rows_without_warmup():
    assert Phase().batch_size_at(0, 576, 96) == 576


def test_recipe_keeps_the_models_fields():
    model = ModernBertConfig.large(global_rope_theta=10_000.0)
    made = configs.recipe(model, weight_decay=1e-6, seed=3).model
    assert made == model.replace(dtype="bfloat16", attention_out_dropout=0.1)


def test_the_quirks_flags_are_fields():
    """What the docstrings name turns each quirk on."""
    import tyro

    args = [
        "--loss-weighting", "sequences", "--mask-special-tokens",
        "--optimizer.max-learning-rate", "8e-4", "--no-init-optimizer",
        "--phases.0.corpus", "BIOMEDICAL", "CLINICAL", "--phases.1.corpus", "CLINICAL",
    ]  # fmt: skip
    default = config_of("bioclinical_base")
    config = tyro.cli(TrainConfig, args=args, default=default)
    assert config.loss_weighting == "sequences" and config.mask_special_tokens
    assert config.optimizer.max_learning_rate == 8e-4 and not config.init_optimizer
    assert [phase.corpus for phase in config.phases] == [("BIOMEDICAL", "CLINICAL"), ("CLINICAL",)]
    text = importlib.import_module("train.configs.bioclinical_base").__doc__ or ""
    assert all(arg in text for arg in args if arg.startswith("--"))
