"""fastldm's operations inside models that know nothing of fastldm: `fastldm.apply` and what belongs to it.

`engine.py` finds, swaps and reverts; `torch_nn.py` and `diffusers.py` say which classes and how. To support
another library, add a file of rules like these and name it in `rules.py`.
"""

from fastldm.integrations.engine import applied, apply, revert
from fastldm.integrations.report import Entry, Report
from fastldm.integrations.verification import Verification, verify
from fastldm.integrations.warming import warmup

__all__ = ["Entry", "Report", "Verification", "applied", "apply", "revert", "verify", "warmup"]
