"""The CUDA extension: what is missing is said, what can be compiled is, within limits of resources."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastldm.errors import BuildError
from fastldm.native import build_cuda
from fastldm.native.library import load_cuda

# What each kernel may take, on every architecture. One that takes more has lost occupancy or spills: look
# before raising a limit.
LIMITS = {
    kernel: build_cuda.Usage(**limits)
    for path in Path(__file__).parent.glob("limits/*.json")
    for kernel, limits in json.loads(path.read_text()).items()
}

SAID = """\
ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN7fastldm4cuda5entryINS0_1KIfEEEEvNT_6ParamsE' for 'sm_80'
ptxas info    : Function properties for _ZN7fastldm4cuda5entryINS0_1KIfEEEEvNT_6ParamsE
    24 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 121 registers, used 1 barriers, 272 bytes smem, 392 bytes cmem[0]
ptxas info    : Compile time = 35.475 ms
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


@pytest.fixture(scope="module")
def binary():
    return build_cuda.build()


@pytest.mark.nvcc
def test_loads_and_registers_without_a_gpu(binary):
    for name in ("matmul", "cluster_sum", "histogram", "warp", "copy", "math"):
        assert getattr(load_cuda(), f"selftest_{name}").default._schema.returns == []
    with pytest.raises(RuntimeError, match="take tensors on a CUDA device"):
        load_cuda().selftest_warp(torch.zeros(32), torch.zeros(10, 32))


@pytest.mark.nvcc
def test_resources_are_within_the_limits(binary):
    found = build_cuda.resources(binary)
    assert {arch for _, arch in found} == {"sm_80", "sm_90a"}
    kernels = {kernel for kernel, _ in found}
    assert kernels == set(LIMITS), "tests/cuda/limits names each kernel"
    for (kernel, arch), usage in found.items():
        for what, limit in LIMITS[kernel]._asdict().items():
            assert getattr(usage, what) <= limit, f"{kernel} on {arch}: {usage}"


@pytest.mark.nvcc
@pytest.mark.gpu
def test_self_test_on_the_gpu(binary):
    ops = load_cuda()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = torch.randn(72, 80, device="cuda").to(dtype), torch.randn(96, 80, device="cuda").to(dtype)
        c = torch.full((72, 96), torch.nan, device="cuda")
        ops.selftest_matmul(a, b, False, c)
        # tf32 keeps 10 bits of the factors.
        assert (c - a.double() @ b.double().t()).abs().max() <= (0.05 if dtype is torch.float32 else 5e-5)
    x, y = torch.randn(384, device="cuda"), torch.full((384,), torch.nan, device="cuda")
    ops.selftest_copy(x, y)
    assert torch.equal(x, y)
    if torch.cuda.get_device_capability() >= (9, 0):
        rows, sums = torch.randn(3, 1000, device="cuda"), torch.full((3,), torch.nan, device="cuda")
        ops.selftest_cluster_sum(rows, 4, sums)
        assert (sums - rows.double().sum(1)).abs().max() <= 2e-5


def test_reading_what_ptxas_said():
    found = build_cuda.read_usage(SAID)
    kernel = next(name for name, arch in found if arch == "sm_80")
    assert kernel in ("K<float>", "_ZN7fastldm4cuda5entryINS0_1KIfEEEEvNT_6ParamsE")
    assert found[kernel, "sm_80"] == (121, 12, 272)
    assert found["other", "sm_90a"] == (32, 0, 0)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """tools(cuda of PyTorch or None, release of nvcc or None): a machine that has these."""

    def make(torch_cuda, nvcc):
        folder = tmp_path / "torch"
        (folder / "lib").mkdir(parents=True)
        (folder / "version.py").write_text(f"__version__ = '2.11.0'\ncuda: Optional[str] = {torch_cuda!r}\n")
        if torch_cuda:
            (folder / "lib/libtorch_cuda.so").touch()
        monkeypatch.setattr(build_cuda, "torch_folder", lambda: folder)
        path = tmp_path / "nvcc"
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.88'\n")
        path.chmod(0o755)
        monkeypatch.setenv("CUDACXX", str(path) if nvcc else "no-such-nvcc")

    return make


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "message"),
    [
        (None, "13.0", "PyTorch is built without CUDA; install a CUDA build of torch"),
        ("13.0", None, "CUDACXX=no-such-nvcc is not nvcc; install the CUDA toolkit"),
        (
            "13.0",
            "12.8",
            "built for CUDA 13.0, but nvcc is of CUDA 12.8; install a toolkit of the same major",
        ),
        ("11.8", "11.8", "nvcc is of CUDA 11.8; install the CUDA toolkit 12.0"),
    ],
)
def test_what_is_missing_is_said(tools, torch_cuda, nvcc, message):
    tools(torch_cuda, nvcc)
    assert message in build_cuda.missing()
    with pytest.raises(BuildError, match="CUDA"):
        build_cuda.build()


@pytest.mark.parametrize(("nvcc", "ptx"), [("12.6", "90"), ("12.8", "100"), ("13.0", "100")])
def test_architectures(tools, nvcc, ptx):
    tools(nvcc, nvcc)
    plan = build_cuda.recipe(build_cuda.find_tools())
    assert plan.isas == ("sm_80", "sm_90a", f"compute_{ptx}")
    assert f"-gencode=arch=compute_{ptx},code=compute_{ptx}" in plan.objects["selftest"]


def test_without_a_binary_env_says_what_is_missing(tmp_path):
    """And everything else runs."""
    code = (
        "import fastldm.env, fastldm.dispatch as d; print(d.find('cuda', 'attention'));"
        "print(fastldm.env.report().backends['torch'])"
    )
    environment = {"FASTLDM_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin", "CUDACXX": "no-such-nvcc"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    reason, torch_backend = done.stdout.splitlines()
    assert reason.startswith("the CUDA kernels are not built and cannot be: "), done.stderr
    assert "without CUDA" in reason or "no-such-nvcc is not nvcc" in reason
    assert torch_backend.count("None") == 4


def test_a_change_of_the_shim_changes_no_binary(tmp_path, monkeypatch):
    copy = tmp_path / "csrc"
    shutil.copytree(build_cuda.sources_folder(), copy)
    monkeypatch.setattr(build_cuda, "sources_folder", lambda: copy)
    monkeypatch.setattr("fastldm.native.build.sources_folder", lambda: copy)
    build_cuda.sources_hash.cache_clear()
    before = build_cuda.binary_name()
    (copy / "cuda/shim/stamp.h").write_text("")
    build_cuda.sources_hash.cache_clear()
    assert build_cuda.binary_name() == before
    (copy / "cuda/common/warp.h").write_text("")
    build_cuda.sources_hash.cache_clear()
    assert build_cuda.binary_name() != before
    build_cuda.sources_hash.cache_clear()
