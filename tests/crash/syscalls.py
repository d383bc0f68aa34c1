"""Checks that the shim records all calls: counts one run with the shim and with strace."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.crash.server import Server
from tests.crash.shim import read_log
from tests.crash.trial import Bench, Tally

_TRACED = (
    "openat,open,creat,write,pwrite64,writev,pwritev,pwritev2,fsync,fdatasync,sync_file_range,syncfs,ftruncate,"
    "truncate,fallocate,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,chmod,fchmod,fchmodat,link,"
    "linkat,symlink,symlinkat,mmap,sendfile,copy_file_range,io_uring_setup,process_vm_writev"
)
_KINDS = {
    "c": "open to write",
    "o": "open to write",
    "t": "truncate or open to write",
    "w": "write",
    "s": "sync",
    "r": "rename",
    "u": "unlink",
    "d": "rmdir",
    "m": "mkdir",
    "a": "chmod",
}


def compare(bench: Bench) -> Tally:
    """One trial per kind of call: the counts of the shim and of strace must be equal."""
    tally = Tally()
    root, log, trace = bench.root("straced"), bench.work / "straced.log", bench.work / "strace.txt"
    prefix = ["strace", "-f", "-y", "-qq", "-s", "0", "-e", f"trace={_TRACED}", "-o", str(trace)]
    server = Server(bench.work, "tests.crash.jobs", prefix=prefix)
    try:
        outcome = server.run("start", root, log=log, overrides=list(bench.overrides))
    finally:
        server.close()
    assert outcome.answer is not None, outcome.fault
    assert outcome.answer["finished"]
    by_shim = Counter(_KINDS[call.kind] for call in read_log(log, root))
    by_strace = Counter(kinds(trace, root))
    opened = ("open to write", "truncate or open to write")
    for counts in (by_shim, by_strace):  # strace does not show whether an opened file existed
        counts["open or truncate"] = sum(counts.pop(kind, 0) for kind in opened)
    for kind in sorted(by_shim | by_strace):
        differs = by_shim[kind] != by_strace[kind]
        tally.add(kind, *[f"{by_shim[kind]} by the shim, {by_strace[kind]} by strace"] * differs)
    tally.facts["calls that change files"] = by_shim.total()
    return tally


def kinds(trace: Path, root: Path) -> list[str]:
    """The kinds of the successful calls in strace's output that change files below `root`."""
    names = []
    for line in whole_lines(trace.read_text(errors="replace")):
        if str(root.resolve()) not in line or not re.search(r"= \d", line):
            continue
        name = re.search(r"\b([a-z_0-9]+)\(", line)
        assert name, line
        match name[1]:
            case "openat" | "open" | "creat":
                if re.search(r"O_WRONLY|O_RDWR", line):
                    names.append("open to write")
            case "ftruncate" | "truncate":
                names.append("truncate or open to write")
            case "write" | "pwrite64" | "writev":
                names.append("write")
            case "fsync" | "fdatasync":
                names.append("sync")
            case "rename" | "renameat" | "renameat2":
                names.append("rename")
            case "unlink" | "unlinkat" | "rmdir":
                names.append("rmdir" if "AT_REMOVEDIR" in line or name[1] == "rmdir" else "unlink")
            case "mkdir" | "mkdirat":
                names.append("mkdir")
            case "chmod" | "fchmod" | "fchmodat":
                names.append("chmod")
            case "mmap":
                if "MAP_SHARED" in line and "PROT_WRITE" in line:
                    names.append("shared mapping")
            case other:
                names.append(other)
    return names


def whole_lines(text: str) -> Iterator[str]:
    """The lines of strace, with interrupted calls joined."""
    unfinished: dict[str, str] = {}
    for line in text.splitlines():
        thread = line.split(maxsplit=1)[0]
        if line.endswith("<unfinished ...>"):
            unfinished[thread] = line.removesuffix("<unfinished ...>")
        else:
            head, resumed, rest = line.partition(" resumed>")
            yield unfinished.pop(thread, head) + rest if resumed else line


def strace_fault() -> str:
    """The reason why strace is not available, or ""."""
    return "" if shutil.which("strace") else "strace is not installed"
