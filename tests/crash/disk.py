"""The possible contents of a disk after a power loss: a model of a POSIX file system that replays recorded calls.

The rules guarantee less than ext4, XFS or Btrfs, so lorafit cannot depend on a guarantee of one file system:

1. Only synced data is durable.
2. A sync of a file makes its bytes and its length durable, but not its name.
3. A sync of a folder makes its current names durable: created, removed and renamed ones. It does not make durable the
   bytes of its files or its own name in its parent.
4. A rename is atomic, also between two folders. The creation and the removal of a name are atomic too.
5. Any subset of the changes of names since the last sync can be on the disk. Of two changes of one name, the later
   change is the valid one.
6. Any 512-byte sectors of the bytes written to a file since its last sync can be on the disk. The other sectors
   contain the old bytes, or, beyond the old length, zeros or data of other files. The length is between the old and the
   new one.
7. A killed process loses no data that the operating system has (R1). This model is about power loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.crash.shim import Call

SECTOR = 512
Image = dict[str, bytes | None]  # path -> the bytes of a file, None for a folder


@dataclass(slots=True, eq=False)
class File:
    """A file: `durable` are the bytes at the last sync, `now` are the current bytes."""

    durable: bytes = b""
    now: bytearray = field(default_factory=bytearray)

    @property
    def dirty(self) -> bool:
        return self.durable != self.now


@dataclass(slots=True, eq=False)
class Folder:
    """A folder: its names, durable and current."""

    durable: dict[str, Node] = field(default_factory=dict)
    now: dict[str, Node] = field(default_factory=dict)


Node = File | Folder
Change = dict[tuple[Folder, str], Node | None]  # names that change atomically; None removes the name


class Disk:
    """The state of one folder and its contents. At the start it is empty and durable."""

    def __init__(self) -> None:
        self.root = Folder()
        self.pending: list[Change] = []  # changes of names that are not synced, oldest first

    def feed(self, call: Call) -> None:
        """Apply a recorded call."""
        match call.kind:
            case "c":
                self._change(call.path, File())
            case "m" if call.path:
                self._change(call.path, Folder())
            case "u" | "d":
                self._change(call.path, None)
            case "r":
                folder, name = self._entry(call.path)
                target = self._entry(call.target)
                self._apply({target: folder.now[name], (folder, name): None})
            case "w":
                if isinstance(node := self.find(call.path), File):
                    missing = call.offset - len(node.now)
                    node.now.extend(bytes(max(missing, 0)))
                    node.now[call.offset : call.offset + len(call.data)] = call.data
            case "t":
                if isinstance(node := self.find(call.path), File):
                    node.now.extend(bytes(max(call.offset - len(node.now), 0)))
                    del node.now[call.offset :]
            case "s":
                self._sync(self.find(call.path))

    def find(self, path: str) -> Node | None:
        """The current node at `path`."""
        node: Node | None = self.root
        for name in path.split("/") if path else ():
            node = node.now.get(name) if isinstance(node, Folder) else None
        return node

    def files(self, path: str) -> dict[str, bytes]:
        """Current names and bytes of the files in the folder at `path`."""
        node = self.find(path)
        entries = node.now.items() if isinstance(node, Folder) else ()
        return {name: bytes(child.now) for name, child in entries if isinstance(child, File)}

    def _entry(self, path: str) -> tuple[Folder, str]:
        parent, _, name = path.rpartition("/")
        folder = self.find(parent)
        assert isinstance(folder, Folder), f"the record does not contain the creation of {parent}"
        return folder, name

    def _change(self, path: str, node: Node | None) -> None:
        self._apply({self._entry(path): node})

    def _apply(self, change: Change) -> None:
        self.pending.append(change)
        _put(change, lambda folder: folder.now)

    def _sync(self, node: Node | None) -> None:
        if isinstance(node, File):
            node.durable = bytes(node.now)
        elif isinstance(node, Folder):
            rest: list[Change] = []
            for change in self.pending:
                if any(folder is node for folder, _ in change):
                    _put(change, lambda folder: folder.durable)
                    for earlier in rest:  # an earlier change of the name can no longer be the last one
                        for entry in change:
                            earlier.pop(entry, None)
                else:
                    rest.append(change)
            self.pending = [change for change in rest if change]

    def images(self, generator: random.Random, most: int) -> Iterator[Image]:
        """Up to `most` possible images: first the extreme ones, then random ones. Images can repeat.

        The first image has no pending change, the second has all of them.
        """
        count, everything = len(self.pending), range(len(self.pending))
        edges: list[tuple[Sequence[int], str]] = [((), "old"), (everything, "new")]
        edges += [(everything, how) for how in ("old", "zeros", "leftovers", "torn")]
        edges += [((), "new")]
        edges += [([i for i in everything if i != left_out], "new") for left_out in everything]
        edges += [([only], "new") for only in everything]
        edges += [(range(end), "torn") for end in range(1, count)]
        if len(edges) > most:
            edges = edges[:7] + generator.sample(edges[7:], most - 7) if most > 7 else edges[:most]
        yield from (self.image(kept, how, generator) for kept, how in edges)
        for _ in range(most - len(edges)):
            kept = [i for i in everything if generator.random() < 0.5]
            yield self.image(kept, "any", generator)

    def image(self, kept: Sequence[int], how: str, generator: random.Random) -> Image:
        """The image with the pending changes `kept`; `how` selects the unsynced bytes (see `content`)."""
        names: dict[Folder, dict[str, Node]] = {}
        for index in kept:
            _put(self.pending[index], lambda folder: names.setdefault(folder, dict(folder.durable)))
        image: Image = {}

        def walk(folder: Folder, path: str) -> None:
            for name, node in names.get(folder, folder.durable).items():
                image[path + name] = content(node, how, generator) if isinstance(node, File) else None
                if isinstance(node, Folder):
                    walk(node, f"{path}{name}/")

        walk(self.root, "")
        return image


def _put(change: Change, entries_of: Callable[[Folder], dict[str, Node]]) -> None:
    for (folder, name), node in change.items():
        if node is None:
            entries_of(folder).pop(name, None)
        else:
            entries_of(folder)[name] = node


def content(file: File, how: str, generator: random.Random) -> bytes:
    """The bytes of a file after the crash.

    `how`: "old" or "new"; "torn": new bytes up to an offset, then the old bytes; "zeros" and "leftovers": the new
    length, with zeros or random bytes beyond the old length; "any": rule 6 at random.
    """
    old, new = file.durable, bytes(file.now)
    if old == new or how == "new":
        return new
    if how == "old":
        return old
    if how == "zeros":
        return old[: len(new)] + bytes(max(len(new) - len(old), 0))
    if how == "leftovers":
        return old[: len(new)] + generator.randbytes(max(len(new) - len(old), 0))
    if how == "torn":
        offset = generator.randint(0, len(new))
        if offset >= len(old):
            return new[:offset]
        start = offset - offset % SECTOR
        return new[:start] + old[start:]
    length = generator.choice([len(old), len(new), generator.randint(*sorted((len(old), len(new))))])
    probability, sectors = generator.random(), []
    for start in range(0, length, SECTOR):
        end = min(start + SECTOR, length)
        if generator.random() < probability and start < len(new):
            sector = new[start:end]
        elif start < len(old):
            sector = old[start:end]
        else:
            sector = generator.choice([bytes(end - start), generator.randbytes(end - start)])
        sectors.append(sector + bytes(end - start - len(sector)))
    return b"".join(sectors)
