"""Describes devices you do not have, and finds their compilers, so that a training step can be
compiled for them on a machine without a TPU or GPU.

jax is imported inside the functions, because `environment` must be applied before jax is imported.
"""

import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

H100 = Path(__file__).with_name("h100_target.txtpb")  # the limits of the device, in XLA's format

_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # do not query a metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling does not occupy a chip
    # libtpu warns if it cannot find these out.
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def is_gpu(topology: str) -> bool:
    """Whether the topology consists of GPUs."""
    return topology.startswith("h100:")


def environment(topology: str, cuda_compiler: str | None = None) -> dict[str, str]:
    """Returns the environment variables to set, before jax is imported, to compile for `topology`.

    cuda_compiler: for GPUs, the folder that `python -m train.plan.install_cuda` filled. Raises
    ValueError if it holds no compiler for the installed version of jax.
    """
    if not is_gpu(topology):
        return dict(_TPU)
    folder = None if cuda_compiler is None else Path(cuda_compiler)
    jax_version = version("jax")
    plugins = f"jax_cuda*_plugin-{jax_version}.dist-info"
    if folder is None or not any(folder.glob(plugins)):
        raise ValueError(
            f"topology {topology}: expected --cuda-compiler DIR with the CUDA compiler of jax "
            f"{jax_version}, got {cuda_compiler or 'none'}; install it with "
            "`python -m train.plan.install_cuda --target DIR`"
        )
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "PYTHONPATH": _append(os.environ.get("PYTHONPATH", ""), folder.resolve()),
        "PATH": _append(os.environ.get("PATH", ""), ptxas_folder(folder.resolve())),
    }


def ptxas_folder(cuda_compiler: Path) -> Path:
    """Where `install_cuda` puts ptxas if it is not already on the PATH."""
    return cuda_compiler / "nvidia" / "cu13" / "bin"


def devices(topology: str) -> list[Any]:
    """Returns the devices of a topology, such as v5e:4x4, v5p:8x8x16, tpu7x:2x2x1 or h100:1x1x8.

    2xv5e:16x16 is two TPU slices that a data center's network joins. GPUs are counted as slices x
    hosts x GPUs per host. Raises ValueError for a topology that the
    compiler does not know and if `environment` is not set.
    """
    from jax.experimental import topologies

    expected = f"topology: expected one such as v5e:4x4, v5p:8x8x16 or h100:1x1x8, got {topology!r}"
    if ":" not in topology:
        raise ValueError(expected)
    try:
        if is_gpu(topology):
            return topologies.get_topology_desc(
                topology_name="h100",
                platform="cuda",
                target_config=H100.read_text(),
                topology=topology.partition(":")[2],
            ).devices
        count, one = re.fullmatch(r"(?:(\d+)x)?(\D.*)", topology).groups()  # type: ignore[union-attr]
        several = {"num_slices": int(count)} if count else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=one, **several).devices
    except Exception as error:  # jax has no common class for these
        raise ValueError(f"{expected} ({str(error).splitlines()[0]})") from error


def chips(devices: list[Any]) -> int:
    """Number of chips: a chip of TPU v4 or TPU7x counts as two devices."""
    return len({(getattr(d, "slice_index", 0), *getattr(d, "coords", (d.id,))) for d in devices})


def _append(paths: str, folder: Path) -> str:
    """Appends `folder` to a list of paths unless it is in it."""
    parts = [part for part in paths.split(os.pathsep) if part]
    return os.pathsep.join(parts if str(folder) in parts else [*parts, str(folder)])
