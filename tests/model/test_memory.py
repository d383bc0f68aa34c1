"""Large tensors come from blocks that are used again, bounded, given back, and refused in words when memory ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from tests.waiting import HANGS

from lorafit.model.native import blocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(blocks() is None, reason="no blocks without a C++ compiler and Linux"),
]

START = """
import resource
import torch
from lorafit.model.memory import release_free_memory, is_out_of_memory, use_caching_allocator, resident_bytes

use_caching_allocator()
MB = 2**20
before = resident_bytes()
def held():
    return (resident_bytes() - before) / MB
"""


def run(body: str) -> None:
    """In a process of its own: the allocator is the whole process's."""
    code = START + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_freed_block_is_used_again_and_keeps_no_hold_on_values() -> None:
    run("""
        first = torch.ones(5 * MB, dtype=torch.uint8)
        at = first.data_ptr()
        other = torch.full((5 * MB,), 3, dtype=torch.uint8)
        del first
        again = torch.zeros(5 * MB - 100, dtype=torch.uint8)  # of the same size class
        assert again.data_ptr() == at
        assert int(again.sum()) == 0
        assert bool((other == 3).all())
        assert at % 64 == 0
        small = torch.ones(1000)
        grown = small.resize_(MB)  # from the heap into a block
        assert bool((grown[:1000] == 1).all())
    """)


def test_what_is_held_stays_near_what_was_once_in_use() -> None:
    run("""
        most = 0.0
        for number in range(40):
            size = 20 + 7 * (number % 13)
            kept = [torch.ones(size * MB, dtype=torch.uint8) for _ in range(2)]
            del kept
            most = max(most, held())
        assert most < 2 * 104 * 1.125 + 64 + 16, most  # the largest pair, the spare, and room for the rest
        release_free_memory()
        assert held() < 16, held()
    """)


def test_a_step_of_the_same_sizes_faults_no_page_twice() -> None:
    run("""
        def step():
            tensors = [torch.ones((3 + number % 5) * MB, dtype=torch.uint8) for number in range(40)]
            while tensors:
                tensors.pop(len(tensors) // 2)
        step()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 500
    """)


def test_where_memory_ends_torch_says_so_and_goes_on() -> None:
    run("""
        spare = [torch.ones(30 * MB, dtype=torch.uint8) for _ in range(10)]
        in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + 50 * MB, in_use + 50 * MB))
        try:
            torch.ones(400 * MB, dtype=torch.uint8)
        except RuntimeError as error:
            assert is_out_of_memory(error), error
        else:
            raise AssertionError
        del spare
        assert int(torch.ones(310 * MB, dtype=torch.uint8)[-1]) == 1  # what was freed makes room for it
    """)


def test_the_profiler_sees_blocks() -> None:
    run("""
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.ones(8 * MB, dtype=torch.uint8)
        assert max(event.cpu_memory_usage for event in profile.events()) >= 8 * MB
    """)
