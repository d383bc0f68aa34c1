"""An export replaces its own unchanged files, and names and keeps everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafit.errors import RunError
from lorafit.export.target import refuse_foreign, target_folder
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import commit_files, staging_folder


@pytest.fixture(params=["out", None])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[RunDirectory, str | None, Path]:
    run = RunDirectory(tmp_path / "run")
    run.create()
    output = None if request.param is None else str(tmp_path / "deep" / request.param)
    folder = target_folder(run, "adapter", output)
    commit_files(folder, {"README.md": b"card", "a.bin": b"1"}, {"export": "adapter"})
    return run, output, folder


def test_its_own_files_are_replaced(target: tuple[RunDirectory, str | None, Path]) -> None:
    run, output, folder = target
    (folder / "a.bin").unlink()  # nothing is lost
    assert target_folder(run, "adapter", output) == folder


@pytest.mark.parametrize("name", ["LICENSE", ".git/config", "empty/", "link", "deep/er/notes.txt"])
def test_what_lorafit_did_not_write_is_named_and_stays(
    target: tuple[RunDirectory, str | None, Path], name: str
) -> None:
    run, output, folder = target
    if name == "link":
        (folder / name).symlink_to("nowhere")
    elif name.endswith("/"):
        (folder / name).mkdir()
    else:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    for refuse in (lambda: target_folder(run, "adapter", output), lambda: refuse_foreign(folder)):
        with pytest.raises(RunError, match=f"did not write: `{name.split('/')[0]}`") as caught:
            refuse()
        assert caught.value.problems[0].place == str(folder)
    assert (folder / name).is_symlink() or (folder / name).exists()


def test_a_file_that_was_edited_is_named(target: tuple[RunDirectory, str | None, Path]) -> None:
    run, output, folder = target
    for text in ("CARD", "a longer card"):
        (folder / "README.md").write_text(text)
        with pytest.raises(RunError, match=r"`README.md` has changed since it was exported"):
            target_folder(run, "adapter", output)


def test_a_checkpoint_is_no_export(tmp_path: Path) -> None:
    commit_files(tmp_path / "out", {"a": b"1"}, {"step": 3})
    with pytest.raises(RunError, match="is not empty, and no export"):
        target_folder(RunDirectory(tmp_path / "run"), "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "a").exists()


def test_two_at_once(target: tuple[RunDirectory, str | None, Path]) -> None:
    run, output, folder = target
    message = f"another process is writing `{folder.name}`"
    with staging_folder(folder, {"export": "adapter"}, {}), pytest.raises(RunError, match=message):
        target_folder(run, "adapter", output)


def test_a_run_that_was_removed_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot make the folder"):
        target_folder(RunDirectory(tmp_path / "gone"), "adapter", None)
    assert not (tmp_path / "gone").exists()
