"""keep_freed_memory, in a process of its own: the setting is the whole process's."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

KEEP_AND_FREE = """
import re, torch
from fastldm import keep_freed_memory

def mapped():
    return int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

assert keep_freed_memory()
before = mapped()
large = [torch.empty(3 << 24, dtype=torch.uint8) for _ in range(64)]  # not touched, so not resident
del large
torch.empty(10_000_000)
print(mapped() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_stays_mapped():
    """All 3 GiB of it: a threshold given as a number is at most 2 GiB, past which all would be given back."""
    done = subprocess.run([sys.executable, "-c", KEEP_AND_FREE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 64 * (3 << 24) - (1 << 20)
