"""The extension is compiled when asked and only then; without it everything runs and says so."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastldm.errors import BuildError
from fastldm.native import build

USE = """
import torch, fastldm
x = torch.randn(2, 4, 8, 8)
with fastldm.record() as calls:
    fastldm.ops.group_norm(x, 2)
print(calls.calls[0].backend, "|", calls.calls[0].fallback)
try:
    fastldm.ops.group_norm(x, 2, backend="cpu")
except fastldm.errors.UnsupportedError as error:
    print(error)
"""


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A cache of our own; these tests must not find a packaged extension either."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("FASTLDM_CACHE", str(cache))
    assert build.find_binary() is None
    return cache


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch) -> Path:
    """Notes each call and writes its output, in no time."""
    log = tmp_path / "calls"
    path = tmp_path / "fake-c++"
    path.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {log}\n'
        'if [ "$1" = --version ]; then echo "fake 1.0"; fi\n'
        'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo built > "$2"; fi; shift; done\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    return log


def python(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)


def test_not_built(empty_cache):
    done = python("-c", USE)
    first, second = done.stdout.splitlines()
    assert first == "torch | cpu: the C++ kernels are not built; run `fastldm build`", done.stderr
    assert "run `fastldm build`" in second
    assert not empty_cache.exists()
    shown = python("-m", "fastldm", "env").stdout
    assert (
        "not live: attention, group_norm, vq_nearest, vq_ema_update (the C++ kernels are not built" in shown
    )


def test_a_file_that_is_no_library(empty_cache):
    broken = empty_cache / "x" / build.binary_name()
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not a library")
    broken.with_suffix(".json").write_text('{"bytes": 13}')
    first, _ = python("-c", USE).stdout.splitlines()
    assert first.startswith(f"torch | cpu: {broken} cannot be used: ")
    assert first.endswith("run `fastldm build --force`")


def test_half_a_file_is_not_loaded(empty_cache, fake_compiler):
    """Mapping less than a library says it is kills the process."""
    path = build.build()
    path.write_bytes(path.read_bytes()[:3])
    assert build.find_binary() is None
    assert build.build() == path
    assert build.find_binary() == path


def test_a_user_without_a_home(monkeypatch, fake_compiler):
    """As a container may run: no HOME, and no entry for the user."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FASTLDM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.Path, "home", no_home)
    assert build.find_binary() is None
    with pytest.raises(BuildError, match=r"no home folder .*; set FASTLDM_CACHE"):
        build.build()


def test_an_instruction_set_that_is_not_here():
    done = python("-c", f"import os; os.environ['FASTLDM_CPU_ISA'] = 'bogus'{USE}")
    first, _ = done.stdout.splitlines()
    if build.find_binary() is None:
        assert "not built" in first
    else:
        assert "FASTLDM_CPU_ISA='bogus' is no instruction set of this machine; use one of: " in first
        assert "fastldm build" not in first


def test_builds_once(empty_cache, fake_compiler):
    seen = []
    path = build.build(lambda done, total: seen.append((done, total)))
    assert path.read_text() == "built\n"
    assert build.find_binary() == path
    assert seen[0] == (0, seen[-1][1])
    assert seen[-1][0] == seen[-1][1] == len(seen) - 1
    assert json.loads(path.with_suffix(".json").read_text())["compiler"] == "fake 1.0"

    compiled = len(fake_compiler.read_text().splitlines())
    assert build.build() == path
    assert len(fake_compiler.read_text().splitlines()) == compiled + 1  # --version
    build.build(force=True)
    assert len(fake_compiler.read_text().splitlines()) > compiled + 2


def test_what_the_latest_compiler_made_is_loaded(empty_cache, fake_compiler, monkeypatch, tmp_path):
    first = build.build()
    other = tmp_path / "other-c++"
    shutil.copy(os.environ["CXX"], other)
    monkeypatch.setenv("CXX", str(other))
    os.utime(first, (1, 1))
    second = build.build()
    assert first != second
    assert build.find_binary() == second


def test_changed_sources_are_another_binary(empty_cache, fake_compiler, tmp_path, monkeypatch):
    before = build.build()
    copy = tmp_path / "csrc"
    shutil.copytree(build.sources_folder(), copy)
    (copy / "cpu" / "vq.h").write_text("// changed\n")
    monkeypatch.setattr(build, "sources_folder", lambda: copy)
    build.sources_hash.cache_clear()
    try:
        assert build.find_binary() is None
        assert build.build() != before
    finally:
        build.sources_hash.cache_clear()


def test_a_failing_compiler_leaves_nothing(empty_cache, tmp_path, monkeypatch):
    path = tmp_path / "bad-c++"
    path.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo bad; exit 0; fi\n'
        "case $* in *fsyntax-only*) exit 0;; esac\n"
        "echo 'x.cpp:1: error: no' >&2\nexit 1\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(BuildError, match=r"x\.cpp:1: error: no"):
        build.build()
    assert build.find_binary() is None
    assert not {p.suffix for p in empty_cache.rglob("*")} & {".so", ".o", ".json", ".partial"}


def test_no_compiler(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    with pytest.raises(BuildError, match="CXX=no-such-compiler is not a C"):
        build.build()
    refused = python("-m", "fastldm", "build")
    assert refused.returncode == 2
    assert refused.stderr.startswith("fastldm: error: CXX=no-such-compiler")
    excused = python("-m", "fastldm", "build", "--if-possible")
    assert excused.returncode == 0
    assert "going on without the C++ kernels" in excused.stdout


@pytest.mark.parametrize(
    ("compiler", "message"), [("g++ 'x", "cannot be read: No closing quotation"), ("true", "wrote nothing")]
)
def test_compilers_that_are_none(compiler, message, empty_cache, monkeypatch, tmp_path):
    if compiler == "true":
        path = tmp_path / "silent-c++"
        path.write_text("#!/bin/sh\necho 1.0\n")
        path.chmod(0o755)
        compiler = str(path)
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BuildError, match=message):
        build.build()


def test_a_cache_that_cannot_be_written(tmp_path, fake_compiler, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FASTLDM_CACHE", str(blocked))
    with pytest.raises(BuildError, match="FASTLDM_CACHE"):
        build.build()


def test_recipe_without_x86_compiles_plain_code_only(monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    plan = build.recipe(build.Compiler(("c++",), ""))
    assert plan.isas == ("plain",)
    assert not any(flag.startswith("-m") for command in plan.objects.values() for flag in command)
