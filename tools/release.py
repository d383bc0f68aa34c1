"""Set the version and move the changelog's unreleased entries under it: `make release VERSION=0.2.0`.

Two files change: CHANGELOG.md, and the file that holds the version (`tool.hatch.version` in pyproject.toml).
Nothing is committed, tagged or pushed. The next commands are printed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import date
from pathlib import Path

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]
UNRELEASED = "## [Unreleased]\n"
_HEADING = re.compile(r"^## \[(?P<version>[^\]]+)\] - \d{4}-\d{2}-\d{2}$", re.MULTILINE)
_NEXT = """\
git diff
git commit -am 'Release {version}'
git tag -a v{version} -m 'lorafit {version}'
make dist
git push --follow-tags
.venv/bin/python -m twine upload dist/*
"""


def prepare(root: Path, version: str, day: date) -> list[str]:
    """Set `version`, released on `day`, in the clone `root`. Returns the problems; with a problem, nothing has changed.

    `version` must have the normal form of PEP 440 and be above every released version. It must not be below the
    version of the code.
    """
    path = root / "CHANGELOG.md"
    changelog = path.read_text(encoding="utf-8")
    current = _hatchling(root, "version")
    problems = [*_wrong_version(version, current, changelog), *_wrong_entries(changelog)]
    if changes := _output(root, "git", "status", "--porcelain"):
        problems.append("the working tree is not clean, commit or stash first:\n" + changes)
    if not problems:
        if version != current:
            _hatchling(root, "version", version)
        heading = f"{UNRELEASED}\n## [{version}] - {day.isoformat()}\n"
        path.write_text(changelog.replace(UNRELEASED, heading), encoding="utf-8", newline="\n")
    return problems


def _wrong_version(version: str, current: str, changelog: str) -> list[str]:
    try:
        parsed = Version(version)
    except InvalidVersion:
        return [f"`{version}` is not a version: give one such as 0.2.0"]
    if str(parsed) != version:
        return [f"`{version}` is spelled `{parsed}` in PEP 440"]
    newest = max((Version(match["version"]) for match in _HEADING.finditer(changelog)), default=None)
    if newest is not None and parsed <= newest:
        return [f"{version} is not greater than {newest}, the newest version in CHANGELOG.md"]
    if parsed < Version(current):
        return [f"{version} is less than {current}, the version of the code"]
    return []


def _wrong_entries(changelog: str) -> list[str]:
    if changelog.count(UNRELEASED) != 1:
        return [f"CHANGELOG.md needs one line `{UNRELEASED.strip()}`, and has {changelog.count(UNRELEASED)}"]
    entries = changelog.partition(UNRELEASED)[2].partition("\n## ")[0]
    if not re.search(r"^- ", entries, re.MULTILINE):
        return [f"CHANGELOG.md has no entry (`- ...`) below `{UNRELEASED.strip()}`"]
    return []


def _hatchling(root: Path, *words: str) -> str:
    return _output(root, sys.executable, "-m", "hatchling", *words)


def _output(root: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 (fixed words)
    return done.stdout.rstrip()


def main() -> None:
    """Prepare the release of the version on the command line. Exit code 2 if there is a problem."""
    if len(sys.argv) != 2:
        sys.exit("usage: make release VERSION=0.2.0")
    version = sys.argv[1]
    if problems := prepare(ROOT, version, date.today()):
        print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr)
        sys.exit(2)
    print(f"The version is {version}. Next:\n\n{_NEXT.format(version=version)}", end="")


if __name__ == "__main__":
    main()
