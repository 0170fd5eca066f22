"""What a step frees stays with the process: the next one touches no empty pages."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

STEPS = """
import ctypes, resource, statistics, threading, torch
from tasks.environment import keep_freed_memory
def steps():
    ctypes.CDLL(None).mallopt(-3, 2**17)  # else what was freed before decides
    if {keep}:
        keep_freed_memory()
    faults = []
    for _ in range(25):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(5 * 2**20) for _ in range(4)]  # 20 MiB each
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(statistics.median_low(faults))
if {thread}:
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
else:
    steps()
"""


def faults(*, keep: bool, thread: bool, **environment: str) -> int:
    """Page faults of a step that takes 80 MiB, 20,480 pages of 4 KiB: median of 25.

    The first few find the heap's final layout; how many that takes is the C library's affair.
    """
    done = subprocess.run(
        [sys.executable, "-c", STEPS.format(keep=keep, thread=thread)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
@pytest.mark.parametrize("thread", [False, True])  # Ray Train's workers train in a second one
def test_freed_memory_is_kept(thread: bool) -> None:
    assert faults(keep=False, thread=thread) > 10_000
    assert faults(keep=True, thread=thread) < 100
    assert faults(keep=True, thread=thread, MALLOC_TRIM_THRESHOLD_="131072") > 10_000
