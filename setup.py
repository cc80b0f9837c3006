"""What pyproject.toml cannot say: where the packages come from.

`kernels/<op>` installs as `fastldm.kernels.<op>`, and the C++ and CUDA sources as data of `fastldm.csrc`, so
that an installed copy can be compiled later. It imports without torch: metadata never depends on the machine.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def kernel_packages() -> dict[str, str]:
    """Package name -> folder of every Triton kernel package."""
    found = find_packages(str(ROOT / "kernels"))
    return {f"fastldm.kernels.{name}": f"kernels/{name.replace('.', '/')}" for name in found}


setup(
    packages=[*find_packages(include=["fastldm", "fastldm.*"]), *kernel_packages(), "fastldm.csrc"],
    package_dir={**kernel_packages(), "fastldm.csrc": "csrc"},
    package_data={
        "fastldm": ["configs/*.yaml", "assets/**/*"],
        "fastldm.csrc": ["**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh", "*.md"],
    },
)
