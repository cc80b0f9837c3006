"""Imports point one way: every part of the package names the parts it may use, wherever the import stands."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fastldm"

BASE = {"errors", "_version", "checks"}
KERNELS = {"implementation", "reference", "eager", "kernels", "native"}
MAY_IMPORT = {
    "errors": set(),
    "_version": set(),
    "checks": set(),
    "io": BASE,
    "memory": BASE,
    "pictures": BASE,
    "text": BASE,
    "implementation": BASE,
    "processor": BASE,
    "reference": BASE | {"implementation"},
    "kernels": BASE | {"implementation"},
    "native": BASE | {"implementation", "kernels", "processor"},
    "eager": BASE | {"implementation", "processor", "reference"},
    "dispatch": BASE | KERNELS | {"text"},
    "ops": BASE | {"dispatch"},
    "nn": BASE | {"ops", "dispatch"},
    "models": BASE | {"ops", "nn", "io"},
    "diffusion": BASE,
    "systems": BASE | {"ops", "nn", "io", "pictures", "models", "diffusion"},
    "training": BASE
    | {"ops", "nn", "io", "models", "diffusion", "systems", "dispatch", "pictures"}
    | {"memory"},
    "evaluation": BASE | {"io", "text", "pictures", "models", "diffusion", "systems", "training"},
    "reproduce": BASE | {"io", "pictures", "diffusion", "systems", "training", "evaluation"},
    "testing": BASE | KERNELS | {"dispatch"},
    "env": BASE | KERNELS | {"dispatch", "ops"},
    "cli": BASE
    | {"io", "pictures", "models", "diffusion", "systems", "training", "evaluation", "reproduce"}
    | {"dispatch", "env", "memory", "native", "nn"},
    "integrations": BASE | {"ops", "nn", "dispatch", "testing", "text"},
    "__main__": {"cli"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """First-level parts of fastldm that a file imports, at the top or inside a function."""
    package = ("fastldm", *path.relative_to(PACKAGE).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (prefix, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("fastldm.")}


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT what it may import"
    assert imported_parts(path) - {part} <= MAY_IMPORT[part]


def test_a_wrong_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "nn").mkdir()
    source = tmp_path / "nn" / "layer.py"
    lines = ["from fastldm.models.unet import X", "from . import y", "def f():", "    import fastldm.cli"]
    source.write_text("\n".join(lines))
    assert imported_parts(source) == {"models", "nn", "cli"}
