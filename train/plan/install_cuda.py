"""Installs the CUDA compiler that `plan` needs for GPUs, into a folder of its own.

    python -m train.plan.install_cuda --target DIR

pip installs two wheels of the version of the installed jax, without their dependencies (cuDNN and
similar libraries are not needed), and ptxas from a third if it is not on the PATH; about 400 MB.
Do not install them into an environment: every other program in it would look for a GPU.
"""

import shutil
import subprocess
import sys
from importlib.metadata import version

import tyro


def main(target: str) -> None:
    """Install the CUDA compiler.

    Args:
        target: The folder to fill; pass it to `plan` as --cuda-compiler.
    """
    packages = [f"jax-cuda13-{part}=={version('jax')}" for part in ("plugin", "pjrt")]
    if shutil.which("ptxas") is None:
        packages.append("nvidia-cuda-nvcc==13.*")
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--no-deps", "--upgrade", "--target", target, *packages]
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
