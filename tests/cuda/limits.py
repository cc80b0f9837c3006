"""What each kernel may take, on every architecture: registers of a thread, bytes spilled, bytes of static shared
memory of a block. A kernel that takes more has lost occupancy or spills: look before raising a limit.
"""

from __future__ import annotations

from fastldm.native.build_cuda import Usage

LIMITS = {
    "SelftestMatmul<float16, false>": Usage(128, 0, 0),
    "SelftestMatmul<float16, true>": Usage(128, 0, 0),
    "SelftestMatmul<bfloat16, false>": Usage(128, 0, 0),
    "SelftestMatmul<bfloat16, true>": Usage(128, 0, 0),
    "SelftestMatmul<float, false>": Usage(128, 0, 0),
    "SelftestClusterSum": Usage(40, 0, 64),
    "SelftestHistogram": Usage(32, 0, 96),
    "SelftestWarp": Usage(40, 0, 128),
    "SelftestCopy": Usage(32, 0, 0),
    "SelftestMath": Usage(40, 0, 0),
}
