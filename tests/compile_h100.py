"""Compiles the GPU attention kernels to machine code on a machine without a GPU, and reads it.

    python -m train.plan.install_cuda --target DIR
    python tests/compile_h100.py DIR [--table] [--target sm90|sm80|sm89] [--quick]

Prints JSON with one record per kernel: tensor-core instructions, exponentials that are computed
while a product is in flight, spilled bytes, registers and barriers, from the PTX and the report of
ptxas; `--table` prints the Markdown table of the docs. It
reports what the compiler generated and nothing about numerical results or speed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train.plan.topologies import H100, environment  # noqa: E402

LENGTHS = (1024, 8192)
HEADS = {"base": 12, "large": 16}
WINDOWS = {"global": None, "local": 64}

# How the device limits of an A100 and an L4 differ from those of an H100.
_SM8 = {
    "    feature_extension: ACCELERATED_FEATURES\n": "",
}
_KIND = "NVIDIA H100 80GB HBM3"
TARGETS: dict[str, dict[str, str]] = {
    "sm90": {},
    "sm80": _SM8
    | {"    major: 9\n": "    major: 8\n", "232448": "166912", "233472": "167936"}
    | {_KIND: "NVIDIA A100-SXM4-80GB"},
    "sm89": _SM8
    | {"    major: 9\n": "    major: 8\n    minor: 9\n", "232448": "101376", "233472": "102400"}
    | {_KIND: "NVIDIA L4"},
}
ARCHITECTURES = {"sm90": "sm_90a", "sm80": "sm_80", "sm89": "sm_89"}


def main() -> None:
    parser = argparse.ArgumentParser(description="compile the GPU kernels for an absent GPU")
    parser.add_argument("cuda_compiler", metavar="DIR", help="that install_cuda filled")
    parser.add_argument("--table", action="store_true", help="Markdown instead of JSON")
    parser.add_argument("--target", choices=TARGETS, default="sm90")
    parser.add_argument("--quick", action="store_true", help="one length and one model size")
    parser.add_argument("--head-dim", type=int, default=64)
    arguments = parser.parse_args()
    try:
        settings = environment("h100:1x1x1", arguments.cuda_compiler)
    except ValueError as error:
        sys.exit(f"compile_h100: {error}")
    with tempfile.TemporaryDirectory() as dump:
        prepare(settings, arguments.cuda_compiler, Path(dump))
        records = list(compile_all(arguments, Path(dump)))
    print(table(records) if arguments.table else json.dumps(records, indent=1))


def prepare(settings: dict[str, str], cuda_compiler: str, dump: Path) -> None:
    """Applies the settings that jax reads when it is imported."""
    sys.path.insert(0, cuda_compiler)
    os.environ.update(
        settings,
        XLA_FLAGS=f"--xla_dump_to={dump} --xla_dump_emitter_re=ptx",
        MOSAIC_GPU_DUMP_TO=str(dump),
        MOSAIC_GPU_DUMP_PTX="1",
    )
    # A cached executable would write no PTX.
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)


def compile_all(arguments: argparse.Namespace, dump: Path):
    from jax.experimental import topologies

    text = H100.read_text()
    for old, new in TARGETS[arguments.target].items():
        if old not in text:
            sys.exit(f"compile_h100: expected {old!r} in {H100.name}")
        text = text.replace(old, new)
    topology = topologies.get_topology_desc(
        topology_name=arguments.target, platform="cuda", target_config=text, topology="1x1x1"
    )
    names = ["pallas_hopper", "pallas_triton"] if arguments.target == "sm90" else ["pallas_triton"]
    sizes = [(size, length) for size in HEADS for length in LENGTHS]
    for name in names:
        for size, length in sizes[:1] if arguments.quick else sizes:
            for layer, window in WINDOWS.items():
                shape = (1, length, HEADS[size], arguments.head_dim)
                for kernel, files in compile_one(name, shape, window, topology.devices[0], dump):
                    yield dict(
                        implementation=name,
                        kernel=kernel,
                        layer=layer,
                        heads=HEADS[size],
                        length=length,
                        head_dim=arguments.head_dim,
                        target=arguments.target,
                        **read(files, ARCHITECTURES[arguments.target]),
                    )


def compile_one(name: str, shape: tuple, window: int | None, device, dump: Path):
    """Yields (kernel, its PTX files) for forward, dq and dk/dv, each compiled separately."""
    import importlib

    import jax
    import jax.numpy as jnp

    from modernbert_jax.attention import Bounds

    module = importlib.import_module(f"modernbert_jax.attention.{name}")
    sharding = jax.sharding.SingleDeviceSharding(device)
    B, L, H, K = shape
    argument = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    q, edge = argument(shape, jnp.bfloat16), argument((B, L), jnp.int32)
    lse = argument((B, H, L), jnp.float32)
    if (reason := module.supports(q, Bounds(edge, edge, window), device)) is not None:
        sys.exit(f"compile_h100: {reason}")

    def forward(q, k, v, lo, hi):
        return module.forward(q, k, v, Bounds(lo, hi, window), K**-0.5)

    def backward(q, k, v, out, lse, lo, hi, d_out):
        return module.backward(q, k, v, out, lse, Bounds(lo, hi, window), d_out, K**-0.5)

    back = (q, q, q, q, lse, edge, edge, q)
    for kernel, function, inputs in (
        ("forward", forward, (q, q, q, edge, edge)),
        # The compiler removes what a result does not need.
        ("dq", lambda *x: backward(*x)[0], back),
        ("dk/dv", lambda *x: backward(*x)[1:], back),
    ):
        before = set(dump.glob("*.ptx"))
        with absent_gpu(device):
            jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).compile()
        yield kernel, sorted(set(dump.glob("*.ptx")) - before)


def absent_gpu(device):
    """Tells jax 0.11 and later, at lowering, which GPU a Triton kernel is for."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    kind = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="cuda")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))


def read(files: list[Path], architecture: str) -> dict:
    """Counts instructions in the PTX of the attention kernel among `files`; runs ptxas on it."""
    texts = {file: file.read_text() for file in files}
    entry = r"\.entry \w*(attention|mosaic_gpu)\w*"
    ours = [file for file, text in texts.items() if re.search(entry, text)]
    if len(ours) != 1:
        sys.exit(f"compile_h100: expected the PTX of one kernel, got {len(ours)}")
    text = texts[ours[0]]
    command = ["ptxas", f"-arch={architecture}", "-v", str(ours[0]), "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers(?:, used (\d+) barriers)?", report)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if used is None or spilled is None:
        sys.exit(f"compile_h100: expected ptxas to report registers and spills, got {report!r}")
    return dict(
        wgmma=len(re.findall(r"wgmma\.mma_async", text)),
        mma_sync=len(re.findall(r"\bmma\.sync", text)),
        overlapped_exp2=sum(
            len(re.findall(r"\bex2\.approx", meanwhile))
            for meanwhile in re.findall(r"wait_group\S+\s+1;(.*?)wait_group", text, re.DOTALL)
        ),
        tma_copies=len(re.findall(r"cp\.async\.bulk\.tensor", text)),
        spilled_bytes=int(spilled[1]) + int(spilled[2]),
        registers=int(used[1]),
        barriers=int(used[2] or 0),
    )


def table(records: list[dict]) -> str:
    """One row per kernel and kind of layer; values that differ between shapes are listed."""
    columns = ["wgmma", "mma_sync", "spilled_bytes", "registers", "barriers"]
    head = [
        "file",
        "kernel",
        "layer",
        "wgmma",
        "mma.sync",
        "spilled bytes",
        "registers",
        "barriers",
    ]
    rows: dict[tuple, list[dict]] = {}
    for record in records:
        key = record["implementation"], record["kernel"], record["layer"]
        rows.setdefault(key, []).append(record)
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for key, same in rows.items():
        cells = [", ".join(str(x) for x in sorted({record[c] for record in same})) for c in columns]
        lines.append(f"| {' | '.join([*key, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
