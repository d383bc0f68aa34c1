"""Builds the documentation site; a dead link, a missing page or a page outside the navigation is an error.

The pages keep their paths of the repository, so a link works in the repository and on the site.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "zensical.toml"
STYLE = "docs/site.css"
NAMES = ("README.md", "README.ko.md", "CONTRIBUTING.md", "CHANGELOG.md", "demo/README.md")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def pages(root: Path) -> list[Path]:
    """The Markdown files of the site."""
    return [*(root / name for name in NAMES), *sorted((root / "docs").glob("*.md"))]


def linked_files(page: Path) -> dict[str, Path]:
    """The links of a page to other files of the project, and the file of each link."""
    targets = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text(encoding="utf-8")))
    local = [target for target in targets if not re.match(r"https?://|mailto:|#", target)]
    return {target: (page.parent / unquote(target.partition("#")[0])).resolve() for target in local}


def pages_in_navigation(entry: Any) -> list[str]:
    """The pages that an entry of `nav` names, at every level."""
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [page for child in children for page in pages_in_navigation(child)]


def problems(root: Path) -> list[str]:
    """Links that lead to no file, and differences between the pages and the navigation. Imports no other package."""
    errors = []
    existing = [page for page in pages(root) if page.is_file()]
    for page in existing:
        name = page.relative_to(root).as_posix()
        for target, file in linked_files(page).items():
            if not (file.is_relative_to(root) and file.is_file()):
                errors.append(f"{name}: the link `{target}` leads to no file of the project")
            elif file.suffix == ".md" and file not in existing:
                errors.append(f"{name}: the link `{target}` leads to a page outside the site")
    navigation = tomllib.loads((root / CONFIG).read_text(encoding="utf-8"))["project"]["nav"]
    listed, written = (
        pages_in_navigation(navigation),
        [page.relative_to(root).as_posix() for page in existing],
    )
    errors += [f"{CONFIG}: the page `{name}` does not exist" for name in listed if name not in written]
    errors += [f"{CONFIG}: the page `{name}` is missing in `nav`" for name in written if name not in listed]
    return errors


def copy_pages(root: Path, folder: Path) -> None:
    """Copy every page, every other file that a page links to, and the style to the same paths below `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    linked = {file for page in pages(root) for file in linked_files(page).values()}
    for file in {*pages(root), *linked, root / STYLE}:
        copy = folder / file.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def build(root: Path, folder: Path) -> list[str]:
    """Build the pages of `root` into `folder`/build/site. Returns the errors; an empty list is success."""
    if errors := problems(root):
        return errors
    copy_pages(root, folder / "build" / "docs")
    if folder != root:
        shutil.copyfile(root / CONFIG, folder / CONFIG)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 (fixed words)
    output = f"{done.stdout}{done.stderr}".partition("Traceback")[0].strip()
    return [output or f"zensical ended with {done.returncode}"] if done.returncode else []


def main() -> int:
    """Build the site of this project. Returns 0, or 1 if there is an error."""
    errors = build(ROOT, ROOT)
    for line in errors:
        print(f"error: {line}", file=sys.stderr)
    if not errors:
        print("build/site: open it with `python -m http.server --directory build/site`")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
