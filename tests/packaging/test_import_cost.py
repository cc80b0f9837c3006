"""`import fastldm` adds almost nothing to `import torch`: no CUDA start, no compiler, no optional library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROBE = """
import json, sys
import torch
before = set(sys.modules)
import fastldm
{extra}
new = sorted({{name.split(".")[0] for name in set(sys.modules) - before}})
own = sorted(name for name in sys.modules if name.startswith("fastldm"))
print(json.dumps({{"new": new, "cuda": torch.cuda.is_initialized(), "fastldm": own}}))
"""
OPTIONAL = {"diffusers", "transformers", "accelerate", "tensorboard", "triton", "tokenizers", "PIL", "yaml"}


def probe(extra: str = "") -> dict:
    code = PROBE.format(extra=extra)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


def test_import_is_light():
    seen = probe()
    assert seen["fastldm"] == ["fastldm", "fastldm._version"]
    assert not seen["cuda"]


@pytest.mark.parametrize("name", ["ops", "nn", "models", "diffusion", "reference", "testing"])
def test_no_optional_library_is_pulled_in(name):
    seen = probe(f"fastldm.{name}")
    assert not OPTIONAL & set(seen["new"])
    assert not seen["cuda"]


def test_every_public_name_exists():
    code = "import fastldm; [getattr(fastldm, name) for name in fastldm.__all__]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_unknown_name_is_an_attribute_error():
    import fastldm

    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fastldm.no_such_thing
