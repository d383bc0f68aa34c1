"""Canary secrets in the environment, `.env`, URLs and settings: no file that a command writes and nothing it says
holds one, in clear or encoded.
"""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.hostile.server import Outcome, Server
from tests.hub.stub import GOOD_TOKEN, Hub
from tests.tiny_models import write_model, write_rows
from tests.waiting import until

pytestmark = pytest.mark.slow

ENVIRONMENT = {
    "HF_TOKEN": GOOD_TOKEN,
    "HUGGING_FACE_HUB_TOKEN": "hf_canaryOfTheOldName0",
    "WANDB_API_KEY": "canary+wandb/Ab3=41fd9a",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-pass&word",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+Zx81kq/77pQ",
    "OPENAI_API_KEY": "sk-canary0123456789abcdef",
    "LORAFIT_SERVE_TOKEN": "canary-serve-0123456789",
    "DATABASE_PASSWD": "canary database pass",
}
DOTENV = {"GITHUB_TOKEN": "ghp_canary0123456789dotenv", "COMET_API_KEY": "canary~dotenv~comet~55"}
LOGIN = "canaryLoginOfAnUrl77"
SETTING = "hf_canaryInSettings0123456"
CANARIES = [*ENVIRONMENT.values(), *DOTENV.values(), LOGIN, SETTING]
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY = ("model.dtype=float32", "model.device=cpu", "lora.rank=2", "train.batch_size=2")  # fmt: skip
ASK = ("--max-tokens", "2", "--device", "cpu")
ARTEFACTS = 200


def forms(secret: str) -> Iterator[bytes]:
    """How a secret may look: as it is, in JSON, in a URL, in hexadecimal, within text in base 64."""
    raw = secret.encode()
    yield from (raw, json.dumps(secret)[1:-1].encode(), quote(secret, safe="").encode(), raw.hex().encode())
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for before in range(3):  # the four characters at either end mix with what is next to it
            yield encode(bytes(before) + raw)[4:].rstrip(b"=")[:-4]


FORMS = {form: secret for secret in CANARIES for form in forms(secret)}


def leaks(content: bytes) -> set[str]:
    return {secret for form, secret in FORMS.items() if form in content}


@pytest.mark.parametrize("secret", CANARIES)
def test_the_search_finds_each_form_anywhere(secret: str) -> None:
    for before in (b"", b"x", b"xy", b"xyz"):
        text = before + secret.encode() + b"more of it"
        for content in (text, base64.b64encode(text), base64.urlsafe_b64encode(text), text.hex().encode()):
            assert secret in leaks(b"\0\1" + content + b"\n")
    assert secret in leaks(b"https://example.org/?key=" + quote(secret, safe="").encode())
    assert not leaks(b"a canary, hf_canary and the rest of the cage")


class Cage:
    """A folder in which commands run with the canaries about them; what they say is kept."""

    def __init__(self, folder: Path, hub: Hub, *, careless: bool = False) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        self.said: dict[str, str] = {}
        (self.work / ".env").write_text("".join(f"{name}={value!r}\n" for name, value in DOTENV.items()))
        inherited = {name: os.environ[name] for name in ("PATH", "LANG", "HOME") if name in os.environ}
        inherited |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(self.work / "hf")}
        self.server = Server(environment=inherited | ENVIRONMENT, network=True, careless=careless)

    def run(self, *words: object) -> Outcome:
        done = self.server.run([str(word) for word in words], self.work, [self.folder])
        self.said[f"{len(self.said)} stdout of {words[:2]}"] = done.out
        self.said[f"{len(self.said)} stderr of {words[:2]}"] = done.err
        return done

    def artefacts(self) -> Iterator[tuple[str, bytes]]:
        """Every file, with its name, and everything said, where there is anything in it."""
        yield from ((name, text.encode()) for name, text in self.said.items() if text)
        for path in sorted(self.work.rglob("*")):
            if path.name != ".env" and path.is_file() and path.stat().st_size:
                yield str(path), str(path.relative_to(self.work)).encode() + b"\n" + path.read_bytes()


def failures(model: Path, rows: Path) -> Iterator[tuple[object, ...]]:
    """Commands that must fail and have a secret before their eyes."""
    good = ("train", "--model", model, "--data", rows, *TINY)
    url = f"https://user:{LOGIN}@example.org/file.json"
    yield ("train", "--model", model, "--data", url, *TINY)
    yield ("train", "--model", url, "--data", rows, *TINY, "run.offline=true")
    yield ("--debug", "train", "--model", model, "--data", url, *TINY)
    yield (*good, f"model.revision={SETTING}")
    yield (*good, f"data.system={SETTING}")
    yield (*good, f"lora.rank={SETTING}")
    yield (*good, f"lora.{SETTING}=1")
    yield (*good, f"data.template={ENVIRONMENT['WANDB_API_KEY']}")
    yield (*good, f"train.schedule={DOTENV['COMET_API_KEY']}")
    yield ("train", "--resume", ENVIRONMENT["AWS_SECRET_ACCESS_KEY"])
    yield ("check", "--model", model, "--data", url)
    yield ("check", "--model", model, "--data", url, "--json")
    yield ("plan", "--model", ENVIRONMENT["OPENAI_API_KEY"], "--data", rows, "run.offline=true")
    yield ("generate", url, "hi", *ASK, "--offline")
    yield ("generate", model, "hi", "--adapter", DOTENV["GITHUB_TOKEN"], *ASK, "--offline")
    yield ("generate", ENVIRONMENT["HUGGING_FACE_HUB_TOKEN"], "hi", *ASK, "--offline")
    yield ("report", ENVIRONMENT["DATABASE_PASSWD"])
    yield ("export", ENVIRONMENT["MLFLOW_TRACKING_PASSWORD"], "adapter")
    yield ("eval", SETTING)


def interrupted(cage: Cage, run: Path, *words: object) -> Outcome:
    """Ctrl-C after the first checkpoint."""

    def watch() -> None:
        until(lambda: any((run / "checkpoints").glob("step-*/manifest.json")))
        cage.server.interrupt()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    done = cage.run(*words)
    watcher.join()
    return done


def test_no_secret_is_written_or_said(tmp_path: Path) -> None:
    hub = Hub()
    model, rows = write_model(tmp_path / "model", **SHAPE), write_rows(tmp_path / "rows.json", 8)
    hub.add("owner/tiny", {path.name: path.read_bytes() for path in model.iterdir()}, is_gated=True)
    hub.add("datasets/owner/rows", {"data/train.json": rows.read_bytes()})
    cage = Cage(tmp_path / "cage", hub)
    whole, broken, fetched = (cage.work / name for name in ("whole", "broken", "fetched"))
    good = ("--model", model, "--data", rows, *TINY, "train.save_every=1")

    done = cage.run("train", *good, "train.max_steps=16", "train.keep=16", "--output", whole)
    assert done.code == 0, done.err
    done = interrupted(
        cage, broken, "train", *good, "train.max_steps=400", "run.verify=false", "--output", broken
    )
    assert done.code != 0
    assert any((broken / "checkpoints").iterdir())
    assert cage.run("train", "--resume", broken).code == 0
    ids = ("--model", "owner/tiny", "--data", "owner/rows", *TINY, "train.max_steps=2", "run.verify=false")
    done = cage.run("train", *ids, "--output", fetched)
    assert done.code == 0, done.err
    for run in (whole, fetched):
        for words in (
            ("generate", run, "hi", *ASK, "--json"),
            ("report", run, "--json"),
            ("export", run, "adapter", "--no-verify"),
            ("runs", run),
        ):
            done = cage.run(*words)
            assert done.code == 0, (words, done.err)
    for words in failures(model, rows):
        done = cage.run(*words)
        assert done.code == 2, (words, done.err, done.out)
    cage.server.close()
    hub.close()

    found = {name: leaks(content) for name, content in cage.artefacts()}
    print(f"{len(found)} artefacts")
    assert len(found) >= ARTEFACTS
    assert {name: secrets for name, secrets in found.items() if secrets} == {}


def test_a_program_that_hides_nothing_is_caught(tmp_path: Path) -> None:
    """With the hiding taken out, the same commands tell what they were told."""
    hub = Hub()
    model, rows = write_model(tmp_path / "model", **SHAPE), write_rows(tmp_path / "rows.json", 8)
    cage = Cage(tmp_path / "cage", hub, careless=True)
    for words in failures(model, rows):
        cage.run(*words)
    words = ("--model", model, "--data", rows, *TINY, "train.max_steps=1", "run.verify=false")
    cage.run("train", *words, f"data.system={SETTING}", "--output", cage.work / "out")
    cage.server.close()
    hub.close()
    found = {name: leaks(content) for name, content in cage.artefacts()}
    assert {LOGIN, SETTING, DOTENV["COMET_API_KEY"], ENVIRONMENT["WANDB_API_KEY"]} <= set().union(
        *found.values()
    )
    assert any(SETTING in secrets for name, secrets in found.items() if name.endswith("config.yaml"))
