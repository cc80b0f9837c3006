"""The command line as a whole: help, unknown words, interruptions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastldm import cli, dispatch
from fastldm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"], ["train", "--help"], ["--version"]])
def test_help_answers_without_torch(arguments):
    code = (
        "import sys; from fastldm.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_python_dash_m_is_the_same_command():
    result = subprocess.run(
        [sys.executable, "-m", "fastldm", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.startswith("fastldm ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smaple", "x"], "did you mean sample?"),
        (["sample", "a red circle", "--guidence-scale", "3"], "did you mean --guidance-scale"),
        (["sample", "a red circle", "--num-images", "two"], "invalid int value: 'two'"),
        (["sample"], "required: CAPTION"),
        (["train", "vq"], "required: --config"),
        (["train", "vae", "--config", "x"], "invalid choice: 'vae'"),
        (["train", "vq", "--config", "x", "--resum"], "did you mean --resume"),
        (["sample", "a red circle", "--sampler", "ddmi"], "did you mean dd"),
        ([], "required: COMMAND"),
    ],
)
def test_flags_and_commands_that_do_not_exist(fails, arguments, said):
    assert said in fails(*arguments)


def test_an_error_is_one_line_and_its_traceback_is_an_environment_variable_away(monkeypatch, fails):
    def broken(arguments):
        raise InputError("first\nsecond")

    monkeypatch.setattr("fastldm.cli.env.run", broken)
    assert fails("env") == "fastldm: error: first second"
    monkeypatch.setenv("FASTLDM_TRACEBACK", "1")
    with pytest.raises(InputError):
        cli.main(["env"])


def test_ctrl_c_ends_with_130_and_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastldm.cli.env.run", interrupted)
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "fastldm: interrupted\n"


def test_env_names_every_backend_and_why_it_is_not_live(capsys):
    assert cli.main(["env"]) == 0
    said = capsys.readouterr().out
    assert cli.main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["backends"]) == set(dispatch.BACKENDS)
    for name, ops in report["backends"].items():
        assert name in said
        assert all(reason is None or reason in said for reason in ops.values())
