"""The documentation against the tree: its links, its commands, its code and the numbers it quotes."""

import argparse
import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastldm.cli import main, sample, train
from fastldm.cli import reproduce as cli_reproduce
from fastldm.reproduce import CLAIMS, shipped_finding, shipped_repetitions
from fastldm.training.config import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {page: page.read_text("utf-8") for page in PAGES}


def ids(page):
    return page.stem


def _prose(text):
    """The text in one line, without the marks of quotations."""
    return " ".join(re.sub(r"^> ?", "", text, flags=re.M).split())


def blocks(text, language=""):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    return [block for named, block in fenced if named == language]


def commands():
    for page, text in TEXTS.items():
        for block in blocks(text):
            yield from (pytest.param(line, id=f"{page.stem}: {line}") for line in block.splitlines() if line)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS[page]):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`(?:fastldm/)?((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", TEXTS[page]):
        assert (ROOT / "fastldm" / name).exists(), name


def test_every_page_is_in_the_index():
    index = TEXTS[ROOT / "docs" / "README.md"]
    for page in PAGES:
        assert page.name == "README.md" or f"({page.name})" in index


@pytest.mark.parametrize("command", list(commands()))
def test_commands_are_understood(command):
    program, name, *words = shlex.split(command)
    assert program == "fastldm"
    parser = argparse.ArgumentParser(exit_on_error=False)
    {"sample": sample, "train": train, "reproduce": cli_reproduce}[name].add_arguments(parser)
    given, rest = parser.parse_known_args(words)
    if name == "train":
        given.overrides += rest
        load_config(train.config_class(given.kind), given.config, given.overrides)
    else:
        assert not rest


def _own_pictures():
    """The commands of "Your own pictures", each with what makes it small."""
    section = TEXTS[ROOT / "docs" / "README.md"].partition("## Your own pictures")[2]
    every = ["max_steps=2", "batch_size=2", "mixed_precision=no", "data.num_workers=0", "sample_every=0"]
    drawn = ["sampling.num_inference_steps=2", "sampling.num_images=2"]
    for line in blocks(section)[0].splitlines():
        kind = shlex.split(line)[2]
        fewer = drawn if kind in ("ldm", "glide") else []
        yield pytest.param(line, [*every, *fewer], id=kind)


@pytest.mark.parametrize(("command", "overrides"), list(_own_pictures()))
def test_your_own_pictures_are_trained_on(command, overrides, tmp_path, monkeypatch, capsys):
    _, *words = shlex.split(command)
    folder, labels = tmp_path / "pictures", words[1] == "classifier"
    rng = np.random.default_rng(0)
    rows = []
    for index in range(4):
        name = f"{'cats' if index % 2 else 'dogs'}/{index}.png" if labels else f"{index}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 64, 3), np.uint8)).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": f"A photo of dog number {index}, asleep."}))
    if not labels:
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    assert main([*words, *overrides]) == 0
    model = Path(capsys.readouterr().out.strip())
    assert model.parent.name == f"mine-{words[1]}"
    assert (model.parent / "samples" / "step-000002.png").is_file()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_names_in_code_exist(page):
    for block in blocks(TEXTS[page], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block


@pytest.mark.parametrize("claim", CLAIMS)
def test_pages_quote_the_committed_findings(claim):
    finding = shipped_finding(claim)
    quoted = [page.name for page, text in TEXTS.items() if finding.verdict in _prose(text)]
    assert len(quoted) == 1, f"no page quotes the verdict of {claim}"


@pytest.mark.parametrize("claim", CLAIMS)
def test_differences_of_every_seed_are_those_measured(claim):
    findings = [shipped_finding(claim), *shipped_repetitions(claim)]
    assert [finding.seed for finding in findings] == list(range(len(findings)))
    assert len({finding.holds for finding in findings}) == 1
    wanted = []
    for finding in findings:
        rows = finding.select("difference")
        (row,) = [row for row in rows if row.setting.get("to", "clean CLIP on x0") == "clean CLIP on x0"]
        wanted.append(f"{100 * row.value:+.1f}")
    lines = TEXTS[ROOT / "docs" / "README.md"].splitlines()
    (line,) = [line for line in lines if line.startswith(f"| `{claim}`: ") and line.count("|") == 5]
    assert [cell for cell in map(str.strip, line.split("|")[2:-1]) if cell] == wanted


def test_the_reconstructions_that_are_quoted_are_those_measured():
    rows = json.loads((ROOT / "docs/results/shapes/accuracy.json").read_text())["rows"]
    measured = [
        f"{100 * row['scores']['all']['accuracy']:.1f}%"
        for row in rows
        if row["pictures"] == "reconstructions"
    ]
    text = TEXTS[ROOT / "docs" / "first-stages.md"]
    assert re.findall(r"\d+\.\d%", text) == measured


GLIDE = [
    {"system": "glide", "stage": stage, "pairs": pairs, "attribute": "all"}
    for pairs in ("seen", "held-out")
    for stage in ("base", "upsampler")
]
QUOTED = {
    "glide": [*GLIDE, {"system": "inpainting", "attribute": "all"}],
    "classifier-guidance": [
        {"system": "classifier", "scale": scale, "attribute": attribute}
        for scale in (0.0, 1.0, 2.0, 4.0, 8.0)
        for attribute in ("count", "colour", "shape", "all")
    ],
    "clip": [{"system": "clip", "pairs": pairs} for pairs in ("seen", "held-out")],
}


@pytest.mark.parametrize("page", QUOTED)
def test_numbers_of_systems_are_those_measured(page):
    rows = json.loads((ROOT / "docs/results/systems.json").read_text())["rows"]
    wanted = []
    for about in QUOTED[page]:
        (row,) = [row for row in rows if about.items() <= row.items()]
        assert row["accuracy"] == row["right"] / row["total"]
        wanted.append(f"{100 * row['accuracy']:.1f}%")
    assert re.findall(r"\d+\.\d%", TEXTS[ROOT / "docs" / f"{page}.md"]) == wanted
