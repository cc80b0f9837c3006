"""Import path of the Triton kernels: `fastldm.kernels.<op>`.

The sources live in the top-level `kernels/` folder. An installed wheel holds them as ordinary sub-packages
(setup.py maps them); in a checkout, bare or editable, this file adds the folder to the search path. Only a
folder that stands in a checkout of this project is added: beside an installed wheel, `kernels` is Hugging
Face's package.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "csrc").is_dir():
    __path__.append(str(_root / "kernels"))
