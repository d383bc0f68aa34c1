"""The property tests with fresh seeds, one session of pytest per seed: `make seeds`, or the seeds that are given."""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys

import pytest


def main() -> int:
    """Run them all, name the seeds that fail; exit code 1 where there are such."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="number of fresh seeds")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest-xdist")
    parser.add_argument("--seed", type=int, action="append", help="this seed and not fresh ones")
    parser.add_argument("tests", nargs="*", help="files or folders; all without any")
    wanted = parser.parse_args()
    seeds = wanted.seed or [secrets.randbelow(2**32) for _ in range(wanted.count)]
    failed = []
    for number, seed in enumerate(seeds, 1):
        print(f"seed {seed} ({number} of {len(seeds)})", flush=True)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "hypothesis",
            f"--hypothesis-seed={seed}",
            *wanted.tests,
        ]
        # The order of sets is drawn anew too, from the same seed.
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run([*command, "-n", str(wanted.workers)], env=environment, check=False)
        if done.returncode == pytest.ExitCode.INTERRUPTED:
            return 130
        if done.returncode != pytest.ExitCode.OK:
            failed.append(seed)
    for seed in failed:
        print(f"failed: PYTHONHASHSEED={seed} python -m tests.seeds --seed {seed}")
    print(f"{len(seeds) - len(failed)} of {len(seeds)} seeds passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
