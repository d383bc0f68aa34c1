"""What the studio starts is a process of its own, and the queue starts one training after the other."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.report.runs import write_run
from tests.studio.pages import Studio
from tests.waiting import HANGS, until

from lorafit.errors import RunError
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import write_file
from lorafit.storage.locks import lock
from lorafit.studio import jobs as jobs_file
from lorafit.studio.folder import Folder
from lorafit.studio.jobs import Job, Jobs, stop_run


class Fake:
    """A process that ends when it is told to."""

    def __init__(self, arguments: list[str], **options: Any) -> None:
        self.arguments, self.options, self.pid, self.returncode = arguments, options, 2**22 + 1, None

    def poll(self) -> int | None:
        return self.returncode


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    made: list[Fake] = []

    def popen(arguments: list[str], **options: Any) -> Fake:
        made.append(Fake(arguments, **options))
        return made[-1]

    monkeypatch.setattr(jobs_file.subprocess, "Popen", popen)
    return made


def test_a_command_is_a_process_of_its_own_without_the_token(
    tmp_path: Path, started: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_STUDIO_TOKEN", "a-token-of-the-tests")
    job = Jobs(tmp_path).start(["train", "recipe with blank.yaml"])
    assert started[0].arguments[1:] == ["-m", "lorafit", "train", "recipe with blank.yaml"]
    assert started[0].options["start_new_session"] is True
    assert "LORAFIT_STUDIO_TOKEN" not in started[0].options["env"]
    assert job.command == "lorafit train 'recipe with blank.yaml'"


def test_the_queue_starts_one_training_after_the_other(tmp_path: Path, started: list[Fake]) -> None:
    jobs = Jobs(tmp_path)
    names = [jobs.start(["train", name], waits=True).id for name in ("one", "two", "three")]
    export = jobs.start(["export", "run", "merged"])  # no training: it waits for none
    for number in range(3):
        assert jobs.advance()
        assert not jobs.advance(), "nothing has changed since"
        trainings = [fake for fake in started if "train" in fake.arguments]
        assert [fake.arguments[-1] for fake in trainings] == ["one", "two", "three"][: number + 1]
        trainings[-1].returncode = number  # the second fails, and the third starts all the same
    jobs.advance()
    assert [jobs.job(name).state for name in names] == ["done", "failed", "failed"]
    assert [jobs.job(name).code for name in names] == [0, 1, 2]
    assert jobs.job(export.id).state == "running"


def test_another_studio_knows_the_jobs_and_goes_on_with_the_queue(
    tmp_path: Path, started: list[Fake]
) -> None:
    first = Jobs(tmp_path)
    running, waiting = first.start(["train", "a"]), first.start(["train", "b"], waits=True)
    second = Jobs(tmp_path)
    assert [job.id for job in second.listed()] == [waiting.id, running.id]
    second.advance()  # no process has that number any more
    assert second.job(running.id).state == "ended"
    assert second.job(waiting.id).state == "running"
    assert Jobs(tmp_path / "other").listed() == []


def test_two_studios_of_one_folder_have_one_queue(tmp_path: Path, started: list[Fake]) -> None:
    first, second = Jobs(tmp_path), Jobs(tmp_path)
    names = [jobs.start(["train", name], waits=True).id for jobs, name in ((first, "one"), (second, "two"))]
    assert [job.id for job in first.listed()] == [job.id for job in second.listed()] == names[::-1]
    born = psutil.Process().create_time()
    for fake in (first, second, first, second):
        fake.advance()
        for job in [job for job in fake.listed() if job.state == "running"]:
            alive = replace(job, pid=os.getpid(), born=born)  # as the system sees a process that runs
            write_file(fake.path / f"{job.id}.json", json.dumps(asdict(alive)))
    assert [fake.arguments[-1] for fake in started] == ["one"], (
        "each command starts once, one after the other"
    )
    started[0].returncode = 0
    assert first.advance()
    assert second.advance(), "what another studio has changed is a change"
    assert {first.job(names[0]).state, second.job(names[0]).state} == {"done"}
    assert [fake.arguments[-1] for fake in started] == ["one", "two"]
    second.stop(second.job(names[1]))
    first.forget(first.job(names[0]))
    assert [job.id for job in second.listed()] == [names[1]]


@pytest.mark.parametrize(("code", "state"), [(0, "done"), (2, "failed"), (130, "ended"), (-15, "ended")])
def test_a_command_that_somebody_stopped_has_not_failed(
    tmp_path: Path, started: list[Fake], code: int, state: str
) -> None:
    jobs = Jobs(tmp_path)
    running, waiting = jobs.start(["train", "a"]), jobs.start(["train", "b"], waits=True)
    jobs.stop(waiting)
    assert jobs.job(waiting.id).state == "ended"
    started[0].returncode = code
    jobs.advance()
    assert (jobs.job(running.id).state, jobs.job(running.id).code) == (state, code)
    assert len(started) == 1


def test_what_a_killed_studio_has_left_ends_with_the_next_one(tmp_path: Path) -> None:
    """The server of the talk holds a model in memory, and nobody could reach it any more."""
    jobs = Jobs(tmp_path)
    left = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({HANGS})"])
    try:
        jobs.tie(left.pid)
        Jobs(tmp_path).end_left()
        assert left.poll() is None, "its studio lives: it is this process"
        (file,) = jobs.path.glob("*.tied")
        file.write_text(file.read_text().replace(f"[{os.getpid()}, ", f"[{2**22 + 1}, "))
        (jobs.path / "0.tied").write_text("[")
        Jobs(tmp_path).end_left()
        assert left.wait(HANGS) == -signal.SIGTERM
        assert not file.exists()
    finally:
        left.kill()
        left.wait()


def test_a_failed_training_leads_back_to_its_form(tmp_path: Path, started: list[Fake]) -> None:
    studio = Studio(tmp_path)
    fields = {
        "name": "mine",
        "model.name": "m",
        "data.path": "a.json",
        "data.max_length": "16",
        "act": "start",
    }
    address = studio.send("/new", **fields).headers["location"]
    started[0].returncode = 2
    studio.app.state.jobs.advance()
    (form,) = re.findall(r'href="(/new\?job=\w+)"', studio.ask(address).text)
    page = studio.ask(form).text
    for name, value in (("name", "mine"), ("model.name", "m"), ("data.max_length", "16")):
        assert f'name="{name}" value="{value}"' in page
    (tmp_path / "recipes" / "mine.yaml").write_text("model: [")
    assert studio.ask(form).status_code == 400
    export = studio.app.state.jobs.start(["export", "x", "merged"], output=str(tmp_path / "x"))
    assert "/new?job" not in studio.ask(f"/jobs/{export.id}").text


def test_a_failed_training_does_not_lead_to_the_run_that_took_its_name(
    tmp_path: Path, started: list[Fake]
) -> None:
    studio = Studio(tmp_path)
    jobs, run = studio.app.state.jobs, tmp_path / "run"
    first = jobs.start(["train", "recipe.yaml"], output=str(run))
    started[0].returncode = 2
    jobs.advance()
    write_run(run, 5)
    assert "/runs/" in studio.ask(f"/jobs/{first.id}").text
    resumed = jobs.start(["train", "--resume", str(run)], output=str(run))
    assert "/runs/" in studio.ask(f"/jobs/{first.id}").text, "it is the same run"
    later = jobs.start(["train", "recipe.yaml"], output=str(run))
    assert "/runs/" not in studio.ask(f"/jobs/{first.id}").text
    assert all("/runs/" in studio.ask(f"/jobs/{job.id}").text for job in (resumed, later))


def test_an_export_is_listed_beside_its_run(tmp_path: Path, started: list[Fake]) -> None:
    run = write_run(tmp_path / "run", 5)
    studio = Studio(tmp_path)
    for words in (["export", str(run), "merged"], ["train", "--resume", str(run)]):
        studio.app.state.jobs.start(words, output=str(run))
    page = studio.ask("/").text
    assert f"lorafit export {run} merged" in page
    assert "--resume" not in page, "the list of runs shows it"


def test_a_folder_of_runs_starts_nothing(tmp_path: Path, started: list[Fake]) -> None:
    """A folder may come from somebody else: jobs are read from the user's own cache only."""
    jobs = Jobs(tmp_path)
    job = Job("0" * 16, ("export", "x", "merged", "--push", "evil/x"), str(tmp_path), 1.0)
    for place in (tmp_path, tmp_path / ".studio", tmp_path / ".studio" / "jobs"):
        place.mkdir(exist_ok=True)
        text = json.dumps({field: getattr(job, field) for field in Job.__dataclass_fields__})
        (place / f"{job.id}.json").write_text(text)
    assert Jobs(tmp_path).listed() == []
    assert not jobs.advance()
    assert started == []
    assert tmp_path not in jobs.path.parents
    if os.name != "nt":
        assert jobs.path.stat().st_mode & 0o077 == 0


def test_a_damaged_job_is_left_out(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    for number, text in enumerate(
        ("{", "[]", "null", '{"id": "1"}', '{"id": "x", "words": [], "folder": "", "at": 1}')
    ):
        (jobs.path / f"{number}.json").write_text(text)
    assert Jobs(tmp_path).listed() == []


def test_a_log_is_shown_without_secrets_and_escape_sequences(
    tmp_path: Path, started: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-the-user")
    jobs = Jobs(tmp_path)
    job = jobs.start(["train", "x"])
    (jobs.path / f"{job.id}.log").write_bytes(b"\x1b[31mred\x1b[0m a-secret-of-the-user \xff<script>\n")
    assert jobs.log(job) == "red *** \ufffd<script>\n"
    assert "<script>\n" not in Studio(tmp_path).ask(f"/jobs/{job.id}").text


@pytest.mark.slow
def test_a_command_outlives_its_studio_and_says_what_it_printed(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    job = jobs.start(["--version"])
    assert os.getsid(job.pid) == job.pid != os.getsid(0)
    until(lambda: jobs.advance() and jobs.job(job.id).is_over)
    assert jobs.job(job.id).state == "done"
    assert jobs.log(job).startswith("lorafit ")


def test_only_the_process_of_the_run_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(write_run(tmp_path / "run", 5))
    with pytest.raises(RunError, match="no process trains"):
        stop_run(run)
    run.lock_file.write_text(str(os.getpid()))  # a number alone, of a process that does not hold the lock
    with pytest.raises(RunError, match="no process trains"):
        stop_run(run)
    sent: list[int] = []
    monkeypatch.setattr(psutil.Process, "send_signal", lambda self, number: sent.append(number))
    for words, is_ours in ((["/usr/bin/other"], False), (["python", "-m", "lorafit", "train", "x"], True)):
        monkeypatch.setattr(psutil.Process, "cmdline", lambda self, words=words: words)
        source = "import sys, time; from lorafit.storage.locks import lock; from pathlib import Path\n"
        source += f"with lock(Path({str(run.lock_file)!r})): print('held', flush=True); time.sleep({HANGS})"
        holder = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            if is_ours:
                stop_run(run)
            else:
                with pytest.raises(RunError, match="is not lorafit"):
                    stop_run(run)
        finally:
            holder.kill()
            holder.communicate()
    assert sent == [signal.SIGTERM]


def test_a_run_goes_to_the_bin_whole_and_not_while_it_trains(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 5)
    folder = Folder(tmp_path)
    (name,) = folder.scan()
    with lock(folder.run(name).lock_file), pytest.raises(RunError, match="is being trained"):
        folder.bin(folder.run(name))
    target = folder.bin(folder.run(name))
    assert (target / "metrics.jsonl").is_file()
    assert folder.scan() == {}
    with pytest.raises(RunError, match="no such run"):
        folder.run(name)


def test_chosen_runs_go_to_the_bin_together_or_none_does(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        write_run(tmp_path / name, 5)
    studio = Studio(tmp_path)
    ids = studio.ids()
    with lock(tmp_path / "two" / "run.lock"):
        refused = studio.ask("/bin", "POST", content=f"run={ids['one']}&run={ids['two']}")
    assert (refused.status_code, sorted(studio.ids())) == (400, ["one", "three", "two"])
    assert "is being trained" in refused.text
    moved = studio.ask("/bin", "POST", content=f"run={ids['one']}&run={ids['three']}")
    assert (moved.status_code, list(studio.ids())) == (200, ["two"])
    assert len(list((tmp_path / ".studio" / "bin").iterdir())) == 2
    assert studio.ask("/bin", "POST").status_code == 400


def test_a_note_is_written_where_one_compares_and_leads_back_there(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 5)
    studio = Studio(tmp_path)
    (name,) = studio.ids().values()
    studio.send(f"/runs/{name}/note", note="first <b>\nsecond")
    page = studio.ask("/compare", params={"run": name}).text
    (address,) = re.findall(r'action="(/runs/[^"]+/note[^"]*)"', page)
    assert ">first &lt;b&gt;\nsecond</textarea>" in page
    reply = studio.send(address.replace("&amp;", "&"), note="other")
    assert reply.headers["location"] == f"/compare?run={name}"
    assert studio.send(f"/runs/{name}/note?back=//evil.example", note="").headers["location"] == "/"
