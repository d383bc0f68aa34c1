"""The model of the disk allows what its rules say and nothing else, and finds protocols that forget a sync."""

from __future__ import annotations

import random

from tests.crash.disk import Disk, Image
from tests.crash.shim import Call


def play(*lines: str) -> Disk:
    """A disk after calls written as `kind path [target or data]`."""
    disk = Disk()
    for line in lines:
        kind, path, rest = (*line.split(" "), "")[:3]
        at = 0
        if kind == "w":
            node = disk.find(path)
            at = len(node.now)  # type: ignore[union-attr, arg-type]
        disk.feed(Call(kind, 0, 0, 0, at, path, rest if kind == "r" else "", rest.encode()))
    return disk


def images(disk: Disk) -> list[Image]:
    return list(disk.images(random.Random(0), 400))


SAFE = ["m .new", "c .new/a", "w .new/a abc", "s .new/a", "s .new", "r .new done"]


def test_only_what_was_synced_is_sure() -> None:
    assert {} in images(play(*SAFE))
    assert {"done": None, "done/a": b"abc"} in images(play(*SAFE))


def test_a_synced_rename_of_a_synced_folder_is_whole() -> None:
    assert {tuple(image.items()) for image in images(play(*SAFE, "s "))} == {
        (("done", None), ("done/a", b"abc"))
    }


def test_each_forgotten_sync_shows() -> None:
    whole = {"done": None, "done/a": b"abc"}
    for forgotten in ("s .new/a", "s .new"):
        calls = [call for call in SAFE if call != forgotten]
        found = images(play(*calls, "s "))
        assert whole in found
        assert any(image != whole and "done" in image for image in found), forgotten


def test_a_rename_happens_as_a_whole() -> None:
    disk = play("c old", "w old 1", "s old", "c new", "w new 2", "s new", "s ", "r new old")
    assert {tuple(sorted(image.items())) for image in images(disk)} == {
        (("new", b"2"), ("old", b"1")),
        (("old", b"2"),),
    }


def test_a_later_change_of_a_name_wins_over_an_earlier_one_that_was_not_synced() -> None:
    disk = play("m a", "m b", "s ", "c b/x", "r b/x a/x", "s a")
    assert all("a/x" in image and "b/x" not in image for image in images(disk))


def test_unsynced_bytes_may_be_there_in_part_zero_or_foreign() -> None:
    disk = play("c log", "w log aaaa", "s log", "s ", "w log bbbb")
    found = [image["log"] for image in images(disk)]
    assert {b"aaaa", b"aaaabbbb", b"aaaa\0\0\0\0", b"aaaabb"} <= set(found)
    assert all(data is not None and data.startswith(b"aaaa") for data in found)
    assert any(data not in b"aaaabbbb" and data != b"aaaa\0\0\0\0" for data in found if data)


def test_the_folder_above_must_be_synced_too() -> None:
    disk = play("m run", "c run/a", "w run/a x", "s run/a", "s run")
    assert {} in images(disk)
    assert {} not in images(play("m run", "s ", "c run/a", "w run/a x", "s run/a", "s run"))
