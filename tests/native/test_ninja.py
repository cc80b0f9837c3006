"""Only what has changed is compiled again, whatever the times of the files say."""

from __future__ import annotations

import ctypes
import os
import shutil

import pytest

from fastldm.errors import BuildError
from fastldm.native import build, ninja


@pytest.fixture
def project(tmp_path):
    """compile_() of a library of two sources, of which one reads a header: what progress was told."""
    try:
        compiler = build.find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    sources = tmp_path / "csrc"
    (sources / "cpu").mkdir(parents=True)
    (sources / "cpu/value.h").write_text("#define VALUE 1\n")
    (sources / "cpu/first.cpp").write_text('#include "value.h"\nextern "C" int first() { return VALUE; }\n')
    (sources / "second.cpp").write_text('extern "C" int second() { return 20; }\n')

    def compile_(*flags):
        command = (*compiler.command, "-fPIC", "-Wall", *flags, "-c")
        objects = {"first": (*command, "csrc/cpu/first.cpp"), "second": (*command, "csrc/second.cpp")}
        recipe = ninja.Recipe(objects, (*compiler.command, "-shared"), ())
        told = []
        compile_.said = ninja.run(
            recipe,
            sources,
            tmp_path / "kept",
            tmp_path / "out/it.so",
            lambda *progress: told.append(progress),
        )
        return told

    compile_.sources, compile_.output = sources, tmp_path / "out/it.so"
    return compile_


def value_of(path, tmp_path):
    """first() of a library, loaded under a name of its own: a path is loaded only once."""
    copy = tmp_path / f"{os.urandom(4).hex()}.so"
    shutil.copy(path, copy)
    return ctypes.CDLL(str(copy)).first()


def test_what_has_changed_is_compiled_again(project, tmp_path):
    assert project() == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert value_of(project.output, tmp_path) == 1
    assert project() == [(0, 1), (1, 1)]
    header = project.sources / "cpu/value.h"
    header.write_text("#define VALUE 2\n")
    # As of a file out of an archive.
    os.utime(header, (1, 1))
    assert project()[-1] == (2, 2)
    assert value_of(project.output, tmp_path) == 2
    assert project("-DOTHER")[-1] == (3, 3)


def test_an_error_names_the_command_and_leaves_what_was_there(project, tmp_path):
    project()
    source = project.sources / "second.cpp"
    source.write_text("int second() { return $5 x; }\n")
    with pytest.raises(
        BuildError, match=r"csrc/second\.cpp:1:\d+: error: .*\(command: .*-c csrc/second\.cpp"
    ):
        project()
    assert value_of(project.output, tmp_path) == 1
    source.unlink()
    with pytest.raises(BuildError, match=r"second\.cpp"):
        project()


def test_what_a_compiler_said_is_kept(project):
    (project.sources / "second.cpp").write_text("static int unused = 1;\n")
    for _ in range(2):
        project()
        assert "unused" in project.said["second"]
        assert project.said["first"] == ""


def test_flags_reach_the_compiler_as_they_are(project, tmp_path):
    project("-DVALUE='a $b'", "-Wno-builtin-macro-redefined", "-w")
    assert value_of(project.output, tmp_path) == 1


def test_without_ninja(project, monkeypatch):
    monkeypatch.setattr(ninja.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ninja.shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match="pip install ninja"):
        project()
