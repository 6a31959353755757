"""Devices that are not here: their compilers and their descriptions, so that a step can be compiled
for them on a machine without a TPU or a GPU.

Imports nothing but the standard library at first: the settings must be there before jax is.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".venv-h100"
H100 = Path(__file__).with_name("h100_target.txtpb")  # its device limits, as XLA wants them

_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # no question to a metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling holds no chip that others could want
    # What libtpu would complain that it cannot find out.
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def is_gpu(topology: str) -> bool:
    """Whether a topology is of GPUs."""
    return topology.startswith("h100:")


def environment(topology: str, wheels: Path = WHEELS) -> dict[str, str]:
    """The variables that must be set before jax is imported, to compile for `topology`.

    For GPUs the compiler is installed into `wheels` where it is not there yet (some 400 MB).
    Raises RuntimeError where pip cannot.
    """
    if not is_gpu(topology):
        return dict(_TPU)
    folder = install_cuda(wheels)
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "PYTHONPATH": _with(os.environ.get("PYTHONPATH", ""), folder),
        "PATH": _with(os.environ.get("PATH", ""), ptxas_folder(folder)),
    }


def install_cuda(parent: Path = WHEELS) -> Path:
    """The folder with the CUDA plugin that fits the installed jax; pip runs where it is not there.

    Two wheels without their dependencies (cuDNN and the like are not needed), and ptxas from a
    third where it is not on the PATH. They have a folder of their own: in an environment of the
    project they would make every other program look for a GPU. Raises RuntimeError where pip fails.
    """
    jax_version = version("jax")
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    folder, stamp = parent / f"jax-{jax_version}-{python}", ".complete"
    parent.mkdir(parents=True, exist_ok=True)
    with open(parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at a time: the second one waits
        if (folder / stamp).exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        wheels = [f"jax-cuda13-plugin=={jax_version}", f"jax-cuda13-pjrt=={jax_version}"]
        if shutil.which("ptxas") is None:
            wheels.append("nvidia-cuda-nvcc==13.*")
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        command += ["--no-deps", "--target", str(folder), *wheels]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise RuntimeError(f"pip could not install {', '.join(wheels)} into {folder}")
        (folder / stamp).touch()
        return folder


def ptxas_folder(wheels: Path) -> Path:
    """Where `install_cuda` puts ptxas, if it does."""
    return wheels / "nvidia" / "cu13" / "bin"


def devices(topology: str) -> list[Any]:
    """The devices of an absent slice, such as v5e:4x4, v5p:8x8x16, tpu7x:2x2x1 or h100:1x1x8.

    GPUs are counted as slices x hosts x GPUs a host. Raises ValueError for a topology that the
    compiler does not know and where `environment` is not set.
    """
    from jax.experimental import topologies

    wanted = f"topology: expected one such as v5e:4x4, v5p:8x8x16 or h100:1x1x8, got {topology!r}"
    if ":" not in topology:
        raise ValueError(wanted)
    try:
        if is_gpu(topology):
            return topologies.get_topology_desc(
                topology_name="h100",
                platform="cuda",
                target_config=H100.read_text(),
                topology=topology.partition(":")[2],
            ).devices
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # jax has no one class for it
        raise ValueError(f"{wanted} ({str(error).splitlines()[0]})") from error


def chips(devices: list[Any]) -> int:
    """How many chips they are: a chip of TPU v4 and TPU7x counts as two devices."""
    return len({tuple(getattr(d, "coords", (d.id,))) for d in devices})


def _with(paths: str, folder: Path) -> str:
    """`paths` with `folder` at the end, if it is not among them."""
    parts = [part for part in paths.split(os.pathsep) if part]
    return os.pathsep.join(parts if str(folder) in parts else [*parts, str(folder)])
