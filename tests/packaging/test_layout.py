"""`fastldm.kernels.<op>` imports from a wheel, from every kind of editable install and from a bare checkout.

And Hugging Face's `kernels` package, which diffusers imports, is never shadowed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from fastldm.native import build_cuda

ROOT = Path(__file__).resolve().parents[2]
SITE = sysconfig.get_paths()["purelib"]
PARTS = ["fastldm", "kernels", "csrc"]
FILES = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]
FILES += ["CHANGELOG.md", "CONTRIBUTING.md"]

CHECK = "import fastldm.kernels.common as ours, kernels; print(ours.__file__, kernels.__file__)"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the tree, so that no build litters the real one."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "assets")
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def hf_kernels(tmp_path) -> Path:
    """A stand-in for Hugging Face's `kernels` distribution."""
    folder = tmp_path / "hf"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("def get_kernel(name): return name\n")
    return folder


def run(python: Path | str, code: str, *path: Path | str, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [str(python), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def pip(*args: str, cwd: Path, python: Path | str = sys.executable) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), *args]
    env = {**os.environ, "PYTHONPATH": SITE}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_setup_imports_without_torch(checkout):
    code = f"""
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "--version"]
runpy.run_path({str(checkout / "setup.py")!r}, run_name="__main__")
"""
    assert run(sys.executable, code, SITE, cwd=checkout)


def test_wheel(checkout, hf_kernels, tmp_path):
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), ".", cwd=checkout)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastldm/kernels/common/__init__.py" in names
    assert "fastldm/csrc/README.md" in names
    assert any(name.startswith("fastldm/configs/") for name in names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastldm"}

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    out = run(sys.executable, CHECK, installed, hf_kernels, SITE, cwd=tmp_path)
    assert str(installed / "fastldm" / "kernels" / "common") in out
    assert str(hf_kernels) in out


def test_wheel_with_the_extension(checkout, tmp_path, monkeypatch):
    """One wheel for every Python 3 of the platform; the next wheel of the same folder is pure again."""
    cuda = build_cuda.torch_cuda_version()
    compiler = tmp_path / "fake-c++"
    compiler.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo fake, release {cuda}, V{cuda}.0; fi\n'
        'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo built > "$2"; fi; shift; done\n'
    )
    compiler.chmod(0o755)
    for name in ("CXX", "CUDACXX"):
        monkeypatch.setenv(name, str(compiler))
    command = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), ".")
    monkeypatch.setenv("FASTLDM_BUILD", "1")
    pip(*command, cwd=checkout)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    find = "from fastldm.native.build import find_binary; print(find_binary())"
    found = run(sys.executable, find, tmp_path / "installed", SITE, cwd=tmp_path)
    native = tmp_path / "installed" / "fastldm" / "native"
    assert Path(found).parent == native
    assert len(list(native.glob("fastldm_cuda-*.so"))) == (cuda is not None)

    wheel.unlink()
    monkeypatch.delenv("FASTLDM_BUILD")
    pip(*command, cwd=checkout)
    (pure,) = (tmp_path / "dist").glob("*.whl")
    assert pure.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(pure).namelist())


@pytest.mark.parametrize("mode", ["default", "strict", "compat"])
def test_editable(checkout, hf_kernels, tmp_path, mode):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    settings = [] if mode == "default" else ["--config-settings", f"editable_mode={mode}"]
    command = ["install", "-q", "--no-deps", "--no-build-isolation", *settings, "-e", "."]
    pip(*command, cwd=checkout, python=python)
    for cwd in (tmp_path, checkout):
        out = run(python, CHECK, hf_kernels, SITE, cwd=cwd)
        assert str(Path("kernels", "common")) in out
        assert str(hf_kernels) in out


def test_bare_checkout(checkout, hf_kernels):
    out = run(sys.executable, CHECK, hf_kernels, SITE, cwd=checkout)
    assert str(checkout / "kernels" / "common") in out
    assert str(hf_kernels) in out


def test_sdist_carries_the_sources(checkout, tmp_path):
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    name = run(sys.executable, code, SITE, cwd=checkout).splitlines()[-1]
    shutil.unpack_archive(tmp_path / name, tmp_path / "sdist")
    (folder,) = (tmp_path / "sdist").iterdir()
    for wanted in ("kernels/common/__init__.py", "kernels/README.md", "csrc/README.md", "setup.py"):
        assert (folder / wanted).is_file(), wanted
