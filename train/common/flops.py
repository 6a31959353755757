"""FLOPs of a step, counted from the configuration and lengths, and the peaks of devices.

Model FLOPs are those that the mathematics needs: no padding, nothing computed twice, a local
layer's query sees at most 2 window + 1 keys and a global layer's query its own segment. Hardware
FLOPs add what a step computes besides. A multiply-add counts as two. Norms, RoPE, activations,
softmax and the optimizer are left out: together they are below 1 % of the matrix products.
"""

import dataclasses

import numpy as np

from modernbert_jax import ModernBertConfig
from modernbert_jax.config import FULL


@dataclasses.dataclass(frozen=True)
class Device:
    """Peaks of one jax device. link_bandwidth: to its neighbors, both directions together."""

    flops: float  # dense bf16 FLOP/s
    hbm_bytes: float
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s
    flops_per_cycle: int = 0  # of all matrix units; 0 if not known
    cores: int = 1  # that share one program

    @property
    def clock(self) -> float:
        """Cycles per second at which the matrix units reach the peak."""
        return self.flops / self.flops_per_cycle


GIB, GB = 2.0**30, 1e9
_UNITS_128, _UNITS_256 = (2 * 4 * width**2 for width in (128, 256))

# By jax's device_kind. A TPU device is a chip; of TPU7x, each of a chip's two TensorCores is one
# (half of 2,307 TFLOP/s, 192 GiB, 7,380 GB/s and 1,200 GB/s). libtpu's topologies of absent v4 pods
# count two devices a chip as well, where a real v4 shows one. Sources: Google's page on each TPU
# (docs.cloud.google.com/tpu/docs/v4, v5e, tpu7x; the last has v5p and v6e beside it), for v4's
# links arXiv 2304.01433 (six of 50 GB/s each way); NVIDIA's data sheets, whose tensor figures with
# sparsity are twice these. FLOPs per cycle: two for each cell of four matrix units per core, 128
# wide up to v5 and 256 wide since. The clocks that follow are 1.05, 1.50, 1.75, 1.75 and 2.20 GHz;
# at them libtpu's estimate of a product of 8192 x 8192 matrices is 70 to 90 % of the peak.
PEAK: dict[str, Device] = {
    "TPU v4": Device(275e12, 32 * GIB, 1200 * GB, 600 * GB, 2 * _UNITS_128, cores=2),
    "TPU v5 lite": Device(197e12, 16 * GIB, 819 * GB, 400 * GB, _UNITS_128),
    "TPU v5": Device(459e12, 95 * GIB, 2765 * GB, 1200 * GB, 2 * _UNITS_128, cores=2),
    "TPU v6 lite": Device(918e12, 32 * GIB, 1638 * GB, 800 * GB, _UNITS_256),
    "TPU7x": Device(1153.5e12, 96 * GIB, 3690 * GB, 600 * GB, _UNITS_256),
    "NVIDIA A100-SXM4-40GB": Device(312e12, 40 * GB, 1555 * GB, 600 * GB),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 80 * GB, 2039 * GB, 600 * GB),
    "NVIDIA H100 PCIe": Device(756e12, 80 * GB, 2000 * GB, 600 * GB),
    "NVIDIA H100 80GB HBM3": Device(989e12, 80 * GB, 3350 * GB, 900 * GB),
    "NVIDIA H200": Device(989e12, 141 * GB, 4800 * GB, 900 * GB),
}


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass by part. head: dense and decoder, at predicted positions."""

    linear: float  # the encoder's Wqkv, Wo, Wi, Wo
    attention: float  # scores and their product with the values
    head: float

    @property
    def forward(self) -> float:
        """All parts."""
        return self.linear + self.attention + self.head

    @property
    def train(self) -> float:
        """Forward and backward: a matrix product has two more in the backward pass."""
        return 3 * self.forward


def model_flops(config: ModernBertConfig, lengths: np.ndarray, predicted: float) -> Flops:
    """Returns the model FLOPs of the forward pass over segments of these lengths.

    lengths: tokens of each segment (document), e.g. from `segment_lengths`; [1024] * 32 for full
    sequences. predicted: positions that go through head and decoder, over all segments.
    """
    lengths = np.asarray(lengths, np.float64)
    tokens, D, V = lengths.sum(), config.hidden_size, config.vocab_size
    keys_seen = {
        True: (lengths * lengths).sum(),
        False: (lengths * np.minimum(2 * config.window + 1, lengths)).sum(),
    }
    seen = sum(keys_seen[kind == FULL] for kind in config.layer_types)
    return Flops(
        linear=float(2 * tokens * config.num_hidden_layers * _layer_weights(config)),
        attention=float(4 * D * seen),
        head=float(2 * predicted * (D * D + V * D)),
    )


def hardware_flops(
    config: ModernBertConfig,
    lengths: np.ndarray,
    *,
    sequences: int,
    sequence_length: int,
    predictions: int,
    remat: str = "none",
) -> float:
    """Returns the FLOPs that a training step costs the devices: model FLOPs and what it adds.

    `sequences` of sequence_length tokens with `predictions` positions each, used or padding; the
    attention's backward pass, which recomputes the scores (5 products for the forward pass's 2);
    the loss, which computes its logits twice more; what `remat` (train/pretrain/config.py)
    recomputes. Parts of tiles outside a segment or window are not counted: they depend on the
    kernel.
    """
    D, V = config.hidden_size, config.vocab_size
    tokens, positions = sequences * sequence_length, sequences * predictions
    linear = 2.0 * tokens * config.num_hidden_layers * _layer_weights(config)
    attention = model_flops(config, lengths, 0).attention
    recomputed = {"none": 0.0, "save_dots_and_attention": 0.0, "save_attention": linear}
    recomputed["layers"] = linear + attention
    if remat not in recomputed:
        raise ValueError(f"remat: expected one of {', '.join(recomputed)}, got {remat!r}")
    head = 2.0 * positions * (3 * D * D + 5 * V * D)
    return 3 * linear + 3.5 * attention + head + recomputed[remat]


def segment_lengths(segment_ids: np.ndarray) -> np.ndarray:
    """Returns the tokens of each segment in sequences [..., L]; id 0 is padding."""
    ids = np.asarray(segment_ids)
    ids = ids.reshape(-1, ids.shape[-1])
    starts = np.ones(ids.shape, bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(starts)
    lengths = np.diff(starts, append=ids.size)
    return lengths[ids.ravel()[starts] > 0]


def mfu(tokens_per_second: float, flops_per_token: float, device_kind: str) -> float:
    """Returns the model FLOPs utilization of a device: model FLOPs as a share of its peak.

    tokens_per_second: of one device, without padding. flops_per_token: `model_flops(...).train`
    over the tokens. Raises ValueError for a device whose peak is not in PEAK.
    """
    if device_kind not in PEAK:
        raise ValueError(
            f"device {device_kind!r}: expected one of {', '.join(PEAK)}; add its peak to PEAK in "
            "train/common/flops.py"
        )
    return tokens_per_second * flops_per_token / PEAK[device_kind].flops


def _layer_weights(config: ModernBertConfig) -> int:
    """Returns the number of weights in a layer's four matrices."""
    D, F = config.hidden_size, config.intermediate_size
    return D * 3 * D + D * D + D * 2 * F + F * D
