"""Every command with wrong paths, hosts, ports and numbers: an error of the user, said once, never a bug of ours."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.command import COMMAND, Cli
from tests.runs import tiny_run, tiny_settings
from tests.tiny_models import write_model, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, a run and a sweep's name, and with what the paths below point to."""
    folder = tmp_path_factory.mktemp("drive")
    write_model(folder / "model")
    write_rows(folder / "rows.json")
    tiny_run(tiny_settings(folder, model=folder / "model"), folder / "run", "train.max_steps=2")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(folder)  # the address of a socket is short
        listening.bind("socket")
        os.chdir(here)
    return folder


# What a user can give by mistake where a file or a folder is expected.
WRONG = {
    "missing": "nothing/here",
    "missing here": "./nothing",
    "empty folder": "{ground}/empty",
    "file": "{ground}/file",
    "bytes": "{ground}/binary",
    "below a file": "{ground}/file/x",
    "broken link": "{ground}/broken",
    "loop of links": "{ground}/loop",
    "socket": "{ground}/socket",
    "device": "/dev/null",
    "long name": "x" * 300,
    "long path": "/".join(["x" * 99] * 60),
    "line end": "a\nb",
    "undecodable": "{ground}/\udcff\udcfe",
    "empty text": "",
    "root": "/",
    "home of nobody": "~nobody-at-all/x",
    "url": "https://huggingface.co/owner/name",
    "accents": "{ground}/없는 폴더",
}
MODEL, ROWS, RUN = "{ground}/model", "{ground}/rows.json", "{ground}/run"
QUICK = ("train.max_steps=1", "run.verify=false", "run.samples=0", "model.device=cpu", "data.holdout=0")
# Commands with one wrong path each. `check` prints its faults as results.
PLACES = {
    "train --model": ["train", "--model", "PATH", "--data", ROWS],
    "train --data": ["train", "--model", MODEL, "--data", "PATH"],
    "train --recipe": ["train", "--recipe", "PATH", "--model", MODEL, "--data", ROWS],
    "train RECIPE": ["train", "PATH", "--model", MODEL, "--data", ROWS],
    "train --resume": ["train", "--resume", "PATH"],
    "train init_from": ["train", "--model", MODEL, "--data", ROWS, "lora.init_from=PATH"],
    "train template": ["train", "--model", MODEL, "--data", ROWS, "data.template=PATH.jinja"],
    "plan --model": ["plan", "--model", "PATH", "--data", ROWS],
    "plan --data": ["plan", "--model", MODEL, "--data", "PATH"],
    "check --model": ["check", "--model", "PATH", "--data", ROWS],
    "check --data": ["check", "--model", MODEL, "--data", "PATH"],
    "check --data alone": ["check", "--data", "PATH"],
    "show --model": ["show", "--model", "PATH", "--data", ROWS],
    "show --data": ["show", "--model", MODEL, "--data", "PATH"],
    "generate": ["generate", "PATH", "Hi", "--max-tokens", "1"],
    "generate --adapter": ["generate", MODEL, "Hi", "--adapter", "PATH", "--max-tokens", "1"],
    "generate --file": ["generate", MODEL, "--file", "PATH", "--max-tokens", "1"],
    "chat": ["chat", "PATH"],
    "serve": ["serve", "PATH", "--port", "0"],
    "serve two": ["serve", RUN, "PATH", "--port", "0"],
    "export": ["export", "PATH", "adapter"],
    "report": ["report", "PATH"],
    "eval": ["eval", "PATH"],
    "audit": ["audit", "PATH"],
    "why": ["why", "PATH", "Hi"],
    "without": ["without", "PATH", "--rows", "1"],
    "sweep --resume": ["sweep", "--resume", "PATH"],
}
# Where something is written, a path that does not exist yet is right.
NO_PLACE = ["file", "below a file", "loop of links", "socket", "device", "long name", "long path"]
WRITTEN = {
    "train --output": ["train", "--model", MODEL, "--data", ROWS, *QUICK, "--output", "PATH"],
    "sweep --output": [
        "sweep",
        "--model",
        MODEL,
        "--data",
        ROWS,
        "--vary",
        "lora.rank=1",
        *QUICK,
        "--output",
        "PATH",
    ],
    "tune --output": ["tune", "--model", MODEL, "--data", ROWS, *QUICK, "--output", "PATH"],
    "generate --output": [
        "generate",
        MODEL,
        "--file",
        "{ground}/file",
        "--max-tokens",
        "1",
        "--output",
        "PATH/x",
    ],
    "report --output": ["report", RUN, "--output", "PATH/x"],
    "export --output": ["export", RUN, "adapter", "--output", "PATH"],
}
# Right as it is: a text of one line is a file of prompts, and a folder of no runs is listed as such.
FINE = {("generate --file", "file")}


@pytest.fixture
def drive(
    ground: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str], str], None]:
    """Run a command with `path` for PATH; it must end with code 2 and one message, which says what is wrong."""
    monkeypatch.chdir(tmp_path)

    def run(words: list[str], path: str) -> None:
        path = path.replace("{ground}", str(ground))
        given = [word.replace("PATH", path).replace("{ground}", str(ground)) for word in words]
        done = cli(*given, stdin="Hi\n")
        said = done.out + done.err
        assert done.code == 2, said
        assert "bug in lorafit" not in said, said
        assert "Traceback" not in said, said
        if words[0] != "check":
            assert done.err.count("error: ") == 1, said
        blocks = [line for line in said.splitlines() if line.startswith(("error: ", "fail"))]
        assert len(blocks) == len(set(blocks)) >= 1, said

    return run


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_path_is_an_error_of_the_user(
    place: str, wrong: str, drive: Callable[[list[str], str], None]
) -> None:
    if (place, wrong) in FINE:
        pytest.skip("it is right")
    drive(PLACES[place], WRONG[wrong])


@pytest.mark.parametrize("wrong", NO_PLACE)
@pytest.mark.parametrize("place", WRITTEN)
def test_a_place_that_cannot_be_written_is_an_error_of_the_user(
    place: str, wrong: str, drive: Callable[[list[str], str], None]
) -> None:
    drive(WRITTEN[place], WRONG[wrong])


@pytest.mark.parametrize(
    "words",
    [
        ["serve", MODEL, "--host", "no such host"],
        ["serve", MODEL, "--host", "256.256.256.256"],
        ["serve", MODEL, "--host", ""],
        ["serve", MODEL, "--host", "x" * 300],
        ["serve", MODEL, "--host", "a..b"],
        ["serve", MODEL, "--host", "192.0.2.1", "--port", "0"],
        ["serve", MODEL, "--port", "70000"],
        ["serve", MODEL, "--port", "-1"],
        ["serve", MODEL, "--port", "x"],
        ["serve", MODEL, "--context", "1"],
        ["serve", MODEL, "--kept-prompts", "-1"],
        ["serve", MODEL, "--context", "999999999", "--port", "0"],
        ["generate", MODEL, "Hi", "--max-tokens", "0"],
        ["generate", MODEL, "Hi", "--temperature", "-1"],
        ["generate", MODEL, "Hi", "--temperature", "nan"],
        ["generate", MODEL, "Hi", "--top-p", "2"],
        ["generate", MODEL, "Hi", "--seed", "-1"],
        ["generate", MODEL, "Hi", "--quantize", "int3"],
        ["train", "--nproc", "0"],
        ["export", RUN, "gguf", "--type", "q9"],
        ["export", RUN, "zip"],
        ["config", "train.nothing"],
        ["sweep", "--vary", "lora.rank"],
        ["sweep", "--vary", "lora.rank=1..x", "--random", "2"],
        ["show", "--model", MODEL, "--data", ROWS, "--row", "999999"],
        ["nothing"],
        ["--nothing"],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_a_wrong_value_is_an_error_of_the_user(
    words: list[str], drive: Callable[[list[str], str], None]
) -> None:
    drive(words, "")


@pytest.fixture
def stranger(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The ground as somebody sees it who may not read `secret` and `closed/x`, and write nothing but `own`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "ground"
        shutil.copytree(ground, folder, symlinks=True, ignore=shutil.ignore_patterns("socket"))
        (folder / "secret").write_text("{}")
        (folder / "closed").mkdir()
        (folder / "closed" / "x").mkdir()
        (folder / "own").mkdir()
        Path(name).chmod(0o755)
        for path in (folder, *folder.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() else 0o644)
        (folder / "own").chmod(0o777)
        (folder / "secret").chmod(0)
        (folder / "closed").chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            (folder / "closed").chmod(0o755)


@pytest.mark.parametrize("wrong", ["secret", "closed", "closed/x"])
@pytest.mark.parametrize("place", PLACES)
def test_what_may_not_be_read_is_an_error_of_the_user(
    place: str, wrong: str, stranger: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(stranger / "own" / "cache"))
    monkeypatch.setenv("LORAFIT_NATIVE", "0")
    monkeypatch.chdir(stranger / "own")
    words = PLACES[place]
    path = str(stranger / wrong)
    done = cli(
        *(word.replace("PATH", path).replace("{ground}", str(stranger)) for word in words), stdin="Hi\n"
    )
    said = done.out + done.err
    assert done.code == 2, said
    assert "bug in lorafit" not in said
    assert "Traceback" not in said
    assert words[0] == "check" or done.err.count("error: ") == 1, said


def test_nothing_can_be_written_but_the_output(
    stranger: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches in a folder of somebody else: a run is slower, and says why."""
    monkeypatch.setenv("LORAFIT_CACHE", str(stranger / "closed" / "cache"))
    monkeypatch.setenv("LORAFIT_NATIVE", "0")
    monkeypatch.chdir(stranger)
    words = ["--model", f"{stranger}/model", "--data", f"{stranger}/rows.json", *QUICK]
    done = cli("train", *words, "--output", f"{stranger}/own/run")
    assert done.code == 0, done.err
    assert "the tokens are not cached: Permission denied" in done.err
    done = cli("train", *words)
    assert (done.code, done.err.count("error: ")) == (2, 1)
    assert "cannot make the run directory: Permission denied" in done.err


@pytest.mark.parametrize("encoding", ["ascii", "cp949"])
def test_any_encoding_of_the_output_and_korean_paths(encoding: str, ground: Path, tmp_path: Path) -> None:
    folder = tmp_path / "한국어 폴더"
    shutil.copytree(ground / "model", folder / "모델")
    rows = [{"instruction": "라마가 뭐야?", "input": "", "output": "동물 🦙이다."}] * 20
    (folder / "행.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": encoding, "HF_HUB_OFFLINE": "1"}
    for words in (
        ["show", "--model", "모델", "--data", "행.json", "--row", "1"],
        ["train", "--model", "모델", "--data", "행.json", "--output", "실행", *QUICK],
        ["generate", "실행", "라마가 뭐야?", "--max-tokens", "4"],
        ["check", "--data", "없는.json"],
    ):
        done = subprocess.run([*COMMAND, *words], cwd=folder, env=env, capture_output=True, check=False)
        said = done.stdout + done.stderr
        assert done.returncode == (2 if words[0] == "check" else 0), said
        assert b"Traceback" not in said
        assert b"bug in lorafit" not in said
