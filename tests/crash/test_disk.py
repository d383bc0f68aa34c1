"""The model of the disk gives exactly the images of its rules, and detects protocols with a missing sync."""

from __future__ import annotations

import random

from tests.crash.disk import Disk, Image
from tests.crash.shim import Call


def play(*lines: str) -> Disk:
    """A disk after calls, each written as `kind path [target or data]`."""
    disk = Disk()
    for line in lines:
        kind, path, rest = (*line.split(" "), "")[:3]
        offset = 0
        if kind == "w":
            node = disk.find(path)
            offset = len(node.now)  # type: ignore[union-attr, arg-type]
        disk.feed(Call(kind, 0, 0, 0, offset, path, rest if kind == "r" else "", rest.encode()))
    return disk


def images(disk: Disk) -> list[Image]:
    return list(disk.images(random.Random(0), 400))


SAFE = ["m .new", "c .new/a", "w .new/a abc", "s .new/a", "s .new", "r .new done"]


def test_only_synced_data_is_durable() -> None:
    assert {} in images(play(*SAFE))
    assert {"done": None, "done/a": b"abc"} in images(play(*SAFE))


def test_a_synced_rename_of_a_synced_folder_is_complete() -> None:
    assert {tuple(image.items()) for image in images(play(*SAFE, "s "))} == {
        (("done", None), ("done/a", b"abc"))
    }


def test_each_missing_sync_is_detected() -> None:
    whole = {"done": None, "done/a": b"abc"}
    for missing in ("s .new/a", "s .new"):
        calls = [call for call in SAFE if call != missing]
        possible = images(play(*calls, "s "))
        assert whole in possible
        assert any(image != whole and "done" in image for image in possible), missing


def test_a_rename_is_atomic() -> None:
    disk = play("c old", "w old 1", "s old", "c new", "w new 2", "s new", "s ", "r new old")
    assert {tuple(sorted(image.items())) for image in images(disk)} == {
        (("new", b"2"), ("old", b"1")),
        (("old", b"2"),),
    }


def test_a_later_change_of_a_name_replaces_an_earlier_unsynced_change() -> None:
    disk = play("m a", "m b", "s ", "c b/x", "r b/x a/x", "s a")
    assert all("a/x" in image and "b/x" not in image for image in images(disk))


def test_unsynced_bytes_can_be_partial_zero_or_foreign() -> None:
    disk = play("c log", "w log aaaa", "s log", "s ", "w log bbbb")
    contents = [image["log"] for image in images(disk)]
    assert {b"aaaa", b"aaaabbbb", b"aaaa\0\0\0\0", b"aaaabb"} <= set(contents)
    assert all(data is not None and data.startswith(b"aaaa") for data in contents)
    assert any(data not in b"aaaabbbb" and data != b"aaaa\0\0\0\0" for data in contents if data)


def test_the_parent_folder_must_be_synced_too() -> None:
    disk = play("m run", "c run/a", "w run/a x", "s run/a", "s run")
    assert {} in images(disk)
    assert {} not in images(play("m run", "s ", "c run/a", "w run/a x", "s run/a", "s run"))
