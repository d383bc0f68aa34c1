"""What a disk may hold after the power went: a model of a POSIX file system that is fed with the record of a run.

The rules promise less than ext4, XFS or Btrfs do, so that nothing is relied on that only one of them does:

1. Nothing is durable but what a sync covered.
2. A synced file has its bytes and its length. Its name is another matter.
3. A synced folder has the names that it had then: made, removed and renamed ones. It does not have the bytes of its
   files, nor its own name in the folder above.
4. A rename happens as a whole or not at all, between two folders too; so does making or removing a name.
5. Between syncs the changes of names reach the disk in any selection; of two that concern one name the later wins.
6. Of the bytes written to a file since its last sync any sectors of 512 bytes may be there. The others hold what was
   there before, or, where nothing was, zeros or leftovers of other files. The length is the old one, the new one or
   any between.
7. A process that is killed loses nothing that the operating system was given (R1); this is about the power.
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
    """`durable` is what the last sync covered, `now` what the running system sees."""

    durable: bytes = b""
    now: bytearray = field(default_factory=bytearray)

    @property
    def dirty(self) -> bool:
        return self.durable != self.now


@dataclass(slots=True, eq=False)
class Folder:
    """Names, durable and as the running system sees them."""

    durable: dict[str, Node] = field(default_factory=dict)
    now: dict[str, Node] = field(default_factory=dict)


Node = File | Folder
Change = dict[tuple[Folder, str], Node | None]  # names that change together; None: the name goes


class Disk:
    """The state of one folder and what is below it; starts empty and durable."""

    def __init__(self) -> None:
        self.root = Folder()
        self.pending: list[Change] = []  # changes of names that no sync has covered, oldest first

    def feed(self, call: Call) -> None:
        """Let a recorded call happen."""
        match call.kind:
            case "c":
                self._change(call.path, File())
            case "m" if call.path:
                self._change(call.path, Folder())
            case "u" | "d":
                self._change(call.path, None)
            case "r":
                folder, name = self._place(call.path)
                target = self._place(call.target)
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
        """What the running system sees at `path`."""
        node: Node | None = self.root
        for name in path.split("/") if path else ():
            node = node.now.get(name) if isinstance(node, Folder) else None
        return node

    def files(self, path: str) -> dict[str, bytes]:
        """Names and bytes of the files in the folder at `path`, as the running system sees them."""
        node = self.find(path)
        entries = node.now.items() if isinstance(node, Folder) else ()
        return {name: bytes(child.now) for name, child in entries if isinstance(child, File)}

    def _place(self, path: str) -> tuple[Folder, str]:
        parent, _, name = path.rpartition("/")
        folder = self.find(parent)
        assert isinstance(folder, Folder), f"the record lacks how {parent} was made"
        return folder, name

    def _change(self, path: str, node: Node | None) -> None:
        self._apply({self._place(path): node})

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
                    for earlier in rest:  # what it overwrote can no longer come later
                        for place in change:
                            earlier.pop(place, None)
                else:
                    rest.append(change)
            self.pending = [change for change in rest if change]

    def images(self, dice: random.Random, most: int) -> Iterator[Image]:
        """Up to `most` of the images that the rules allow now: first those at the edges, then random ones.

        They may repeat. The first is the emptiest, the second the fullest.
        """
        count, everything = len(self.pending), range(len(self.pending))
        edges: list[tuple[Sequence[int], str]] = [((), "old"), (everything, "new")]
        edges += [(everything, how) for how in ("old", "zeros", "leftovers", "torn")]
        edges += [((), "new")]
        edges += [([i for i in everything if i != left_out], "new") for left_out in everything]
        edges += [([only], "new") for only in everything]
        edges += [(range(end), "torn") for end in range(1, count)]
        if len(edges) > most:
            edges = edges[:7] + dice.sample(edges[7:], most - 7) if most > 7 else edges[:most]
        yield from (self.image(kept, how, dice) for kept, how in edges)
        for _ in range(most - len(edges)):
            kept = [i for i in everything if dice.random() < 0.5]
            yield self.image(kept, "any", dice)

    def image(self, kept: Sequence[int], how: str, dice: random.Random) -> Image:
        """The image with the pending changes `kept`, and unsynced bytes as `how` says (see `content`)."""
        names: dict[Folder, dict[str, Node]] = {}
        for index in kept:
            _put(self.pending[index], lambda folder: names.setdefault(folder, dict(folder.durable)))
        image: Image = {}

        def walk(folder: Folder, path: str) -> None:
            for name, node in names.get(folder, folder.durable).items():
                image[path + name] = content(node, how, dice) if isinstance(node, File) else None
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


def content(file: File, how: str, dice: random.Random) -> bytes:
    """The bytes of a file after the crash.

    `how`: "old" or "new"; "torn": new up to a place, the rest as it was; "zeros" and "leftovers": the new length,
    but what lies beyond the old one never came; "any": rule 6 at random.
    """
    old, new = file.durable, bytes(file.now)
    if old == new or how == "new":
        return new
    if how == "old":
        return old
    if how == "zeros":
        return old[: len(new)] + bytes(max(len(new) - len(old), 0))
    if how == "leftovers":
        return old[: len(new)] + dice.randbytes(max(len(new) - len(old), 0))
    if how == "torn":
        at = dice.randint(0, len(new))
        return new[:at] if at >= len(old) else new[: at - at % SECTOR] + old[at - at % SECTOR :]
    length = dice.choice([len(old), len(new), dice.randint(*sorted((len(old), len(new))))])
    share, sectors = dice.random(), []
    for at in range(0, length, SECTOR):
        end = min(at + SECTOR, length)
        if dice.random() < share and at < len(new):
            piece = new[at:end]
        elif at < len(old):
            piece = old[at:end]
        else:
            piece = dice.choice([bytes(end - at), dice.randbytes(end - at)])
        sectors.append(piece + bytes(end - at - len(piece)))
    return b"".join(sectors)
