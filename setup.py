"""What pyproject.toml cannot say: where the packages come from, and the optional compiled extensions.

`kernels/<op>` installs as `fastldm.kernels.<op>`, and the C++ and CUDA sources as data of `fastldm.csrc`, so
that an installed copy can be compiled later, by `fastldm build`. It imports without torch: metadata never
depends on the machine. FASTLDM_BUILD=1 compiles the C++ extension into the wheel, and the CUDA one where nvcc
and a CUDA build of torch are found; torch and ninja must then be installed, and pip be given
--no-build-isolation.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
WITH_EXTENSION = os.environ.get("FASTLDM_BUILD", "0") not in ("", "0")


def kernel_packages() -> dict[str, str]:
    """Package name -> folder of every Triton kernel package."""
    found = find_packages(str(ROOT / "kernels"))
    return {f"fastldm.kernels.{name}": f"kernels/{name.replace('.', '/')}" for name in found}


class BuildPython(build_py):
    """Copies the packages and, where asked, compiles the extension beside them."""

    def run(self):
        # What an earlier build of this folder left would travel in this wheel.
        shutil.rmtree(Path(self.build_lib, "fastldm"), ignore_errors=True)
        super().run()
        if WITH_EXTENSION:
            sys.path.insert(0, str(ROOT))
            from fastldm.native import build, build_cuda

            missing = build_cuda.missing()
            if missing is not None:
                print(f"fastldm: going on without the CUDA kernels: {missing}")
            if self.editable_mode:
                build.build()
                if missing is None:
                    build_cuda.build()
                return
            folder = Path(self.build_lib, "fastldm", "native")
            objects = Path(self.get_finalized_command("build").build_temp).resolve()
            build.compile_extension(folder / build.binary_name(), build.find_compiler(), objects / "cpu")
            if missing is None:
                target = folder / build_cuda.binary_name()
                build_cuda.compile_extension(target, build_cuda.find_tools(), objects / "cuda")


class WithExtension(Distribution):
    """Makes setuptools treat the packages as platform-specific."""

    def has_ext_modules(self):
        return WITH_EXTENSION


class Wheel(bdist_wheel):
    """With the extension inside, a wheel fits one platform but, by PyTorch's stable ABI, every Python 3."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if WITH_EXTENSION else (python, abi, platform)


setup(
    packages=[*find_packages(include=["fastldm", "fastldm.*"]), *kernel_packages(), "fastldm.csrc"],
    package_dir={**kernel_packages(), "fastldm.csrc": "csrc"},
    package_data={
        "fastldm": ["configs/*.yaml", "assets/**/*"],
        "fastldm.csrc": ["**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh", "**/*.json", "*.md"],
        **{name: ["tables/*.json"] for name in kernel_packages()},
    },
    distclass=WithExtension,
    cmdclass={"build_py": BuildPython, "bdist_wheel": Wheel},
)
