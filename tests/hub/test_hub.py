"""Models, adapters and datasets come from the hub or its cache, or with an error that says what to do."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from tests.hub.conftest import point_to
from tests.hub.stub import GOOD_TOKEN, STRANGER_TOKEN, Hub

from lorafit.errors import ConfigError, DataError, LorafitError, ModelError
from lorafit.hub.client import adapter_folder, dataset_files, model_folder, token
from lorafit.hub.dataset_splits import FILE_KINDS, suffix_of

MODEL: dict[str, bytes | str] = {
    "config.json": '{"model_type": "llama"}',
    "generation_config.json": '{"eos_token_id": 2}',
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": '{"eos_token": "</s>"}',
    "chat_template.jinja": "{{ messages }}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"weights again",
    "original/model.safetensors": b"and again",
    "modeling_custom.py": "raise SystemExit",
    "README.md": "# a model",
}
READ = {name for name in MODEL if name.split(".")[0] in ("config", "generation_config", "model")} | {
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


# Models


def test_model_by_id_fetches_what_is_read_and_nothing_else(hub: Hub) -> None:
    commit = hub.add("owner/tiny", MODEL)
    found = model_folder("owner/tiny")
    assert (found.name, found.revision) == ("owner/tiny", commit)
    assert names(found.path) == READ
    assert hub.fetched() == READ
    assert (found.path / "model.safetensors").read_bytes() == b"weights"
    assert not [request for request in hub.requests if request.endswith((".bin", ".py", ".pt"))]


def test_sharded_model_fetches_the_shards_once(hub: Hub) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = {
        "config.json": "{}",
        "model.safetensors.index.json": "{}",
        "consolidated-00001-of-00001.safetensors": "x",
    }
    hub.add(
        "owner/big", {**files, **dict.fromkeys(shards, "x"), "original/a-00001-of-00001.safetensors": "x"}
    )
    assert names(model_folder("owner/big").path) == {"config.json", "model.safetensors.index.json", *shards}


def test_a_second_call_downloads_nothing(hub: Hub) -> None:
    hub.add("owner/tiny", MODEL)
    first = model_folder("owner/tiny")
    hub.requests.clear()
    assert model_folder("owner/tiny") == first
    assert hub.fetched() == set()


def test_a_revision_pins_the_files(hub: Hub) -> None:
    old = hub.add("owner/tiny", MODEL)
    new = hub.add("owner/tiny", {**MODEL, "model.safetensors": b"better"})
    hub.repositories["owner/tiny"].refs["v1"] = old
    assert model_folder("owner/tiny").revision == new
    for revision in (old, "v1"):
        found = model_folder("owner/tiny", revision=revision)
        assert found.revision == old
        assert (found.path / "model.safetensors").read_bytes() == b"weights"


def test_local_folders_win_and_are_checked(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("owner/tiny", "~/tiny"):
        folder = Path(name).expanduser()
        folder.mkdir(parents=True)
        with pytest.raises(ModelError, match=r"model.safetensors is missing"):
            model_folder(name)
        (folder / "model.safetensors").touch()
        with pytest.raises(ModelError, match=r"no config.json"):
            model_folder(name)
        (folder / "config.json").touch()
        assert model_folder(name).path == folder
        assert model_folder(name).revision is None
    with pytest.raises(ModelError, match="a local folder has no revision `main`"):
        model_folder("owner/tiny", revision="main")
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["./tiny-lama", "../here/tiny-lama", "~/tiny-lama", "a/b/c", r"models\tiny-lama"]
)
def test_a_path_without_a_folder_is_not_looked_up(name: str, hub: Hub) -> None:
    Path("tiny-llama").mkdir()
    (Path.home() / "tiny-llama").mkdir()
    with pytest.raises(ModelError, match="there is no folder") as caught:
        model_folder(name)
    if name.endswith("tiny-lama") and "/" in name:
        (similar,) = re.findall(r"did you mean the folder (\S+tiny-llama)\?", caught.value.problems[0].hint)
        assert Path(similar).is_dir()
    assert hub.requests == []


def test_pickles_are_refused_with_a_way_out(hub: Hub) -> None:
    hub.add("owner/old", {"config.json": "{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(ModelError, match=r"exist only as a pickle \(pytorch_model.bin\)") as caught:
        model_folder("owner/old")
    assert "save_pretrained" in caught.value.problems[0].hint
    assert hub.fetched() == set()


def test_adapter(hub: Hub) -> None:
    files: dict[str, bytes | str] = {
        "adapter_config.json": "{}",
        "adapter_model.safetensors": b"lora",
        "README.md": "",
        "extra.bin": b"",
    }
    commit = hub.add("owner/lora", files)
    found = adapter_folder("owner/lora")
    assert (found.revision, names(found.path)) == (
        commit,
        {"adapter_config.json", "adapter_model.safetensors"},
    )
    assert adapter_folder(str(found.path)).revision is None
    with pytest.raises(ModelError, match="an adapter, not a model"):
        model_folder("owner/lora")
    hub.add("owner/old-lora", {"adapter_config.json": "{}", "adapter_model.bin": b"pickle"})
    with pytest.raises(ModelError, match="exist only as a pickle"):
        adapter_folder("owner/old-lora")


# Without a network


def test_offline_uses_the_cache_and_opens_no_socket(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/tiny", MODEL)
    hub.add("datasets/owner/rows", {"train.json": "[]", "test.json": "[]"})
    model, data = model_folder("owner/tiny"), dataset_files("owner/rows")
    hub.close()

    def refuse(*args: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    assert model_folder("owner/tiny", offline=True) == model
    assert dataset_files("owner/rows", offline=True) == data
    with pytest.raises(DataError, match=r"test.json of `owner/rows` is not in the local cache") as caught:
        dataset_files("owner/rows", split="test", offline=True)
    assert "hf download owner/rows --repo-type dataset" in caught.value.problems[0].hint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder("owner/tiny") == model
    with pytest.raises(ModelError, match="not in the local cache") as caught_model:
        model_folder("owner/other", revision="v1")
    assert "hf download owner/other --revision v1" in caught_model.value.problems[0].hint


def test_offline_notices_a_file_that_is_missing(hub: Hub) -> None:
    hub.add("owner/tiny", MODEL)
    (model_folder("owner/tiny").path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer.json of `owner/tiny` is not in the local cache"):
        model_folder("owner/tiny", offline=True)


def test_offline_reads_a_cache_without_a_listing(hub: Hub) -> None:
    hub.add("owner/tiny", {"config.json": "{}", "model.safetensors": b"weights"})
    for name in ("config.json", "model.safetensors"):
        huggingface_hub.hf_hub_download("owner/tiny", name)
    assert names(model_folder("owner/tiny", offline=True).path) == {"config.json", "model.safetensors"}


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("owner/tiny", MODEL)
    model = model_folder("owner/tiny")
    hub.close()
    with pytest.raises(ModelError, match=r"no connection to the hub: .*refused") as caught:
        model_folder("owner/other")
    assert "HF_ENDPOINT" in caught.value.problems[0].hint
    assert model_folder("owner/tiny") == model
    assert f"using the cached copy {model.revision}" in caplog.text
    point_to("http://hub.invalid", monkeypatch)
    with pytest.raises(DataError, match="no connection to the hub"):
        dataset_files("owner/rows")


# Who may read what


def test_gated_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("meta/llama", MODEL, is_gated=True)
    for used in (None, STRANGER_TOKEN):
        if used:
            monkeypatch.setenv("HF_TOKEN", used)
        with pytest.raises(ModelError, match="`meta/llama` is gated") as caught:
            model_folder("meta/llama")
        hint = caught.value.problems[0].hint
        assert f"accept the licence on {hub.url}/meta/llama" in hint
        assert "HF_TOKEN" in hint
        assert "hf auth login" in hint
        assert STRANGER_TOKEN not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    assert names(model_folder("meta/llama").path) == READ


def test_a_bad_token_is_not_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/tiny", MODEL)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(ModelError, match="does not accept your token") as caught:
        model_folder("owner/tiny")
    assert "hf_secret" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret two")
    with pytest.raises(ConfigError, match="HF_TOKEN is not a token") as caught_config:
        model_folder("owner/tiny")
    assert "hf_secret" not in str(caught_config.value)


def test_token_sources_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert token() is None
    Path(constants.HF_TOKEN_PATH).write_text("hf_stored\n")
    assert token() == "hf_stored"
    Path(".env").write_text("# a comment\nOTHER=$(touch ran)\nHF_TOKEN=hf_file # mine\nMY_HF_TOKEN=no\n")
    assert token() == "hf_file"
    monkeypatch.setenv("HF_TOKEN", " hf_environment\n")
    assert token() == "hf_environment"
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("HF_TOKEN='hf_a'", "hf_a"),
        ('export HF_TOKEN = "hf_a"  # mine', "hf_a"),
        ("HF_TOKEN=", None),
        ("#HF_TOKEN=hf_a", None),
        ("HF_TOKEN_2=hf_a", None),
    ],
)
def test_dotenv_lines(line: str, expected: str | None) -> None:
    Path(".env").write_text(f"A=1\r\n{line}\r\nB=2\r\n")
    assert token() == expected


# Other errors


def test_unknown_names(hub: Hub) -> None:
    Path("tiny-lama").mkdir()
    with pytest.raises(ModelError, match="the hub has no model `owner/tiny-llama`") as caught:
        model_folder("owner/tiny-llama")
    hint = caught.value.problems[0].hint
    assert "spelling" in hint
    assert "private" in hint
    assert "./tiny-lama" in hint
    with pytest.raises(DataError, match="the hub has no dataset `owner/rows`"):
        dataset_files("owner/rows")


@pytest.mark.parametrize("name", ["tiny", "owner/ti ny", "owner/..", "owner/a--b", ""])
def test_names_that_no_repository_has(name: str, hub: Hub) -> None:
    with pytest.raises(LorafitError, match="an id of the hub"):
        dataset_files(name)
    assert hub.requests == []


def test_unknown_revision(hub: Hub) -> None:
    hub.add("owner/tiny", MODEL)
    with pytest.raises(ModelError, match="`owner/tiny` has no revision `v9`") as caught:
        model_folder("owner/tiny", revision="v9")
    assert caught.value.problems[0].place == f"{hub.url}/owner/tiny at revision v9"


def test_a_file_that_is_listed_but_gone(hub: Hub) -> None:
    hub.add("owner/tiny", MODEL)
    hub.lost.add("tokenizer.json")
    with pytest.raises(ModelError, match=r"a file of `owner/tiny` is missing: .*tokenizer.json"):
        model_folder("owner/tiny")


@pytest.mark.parametrize("status", [500, 503, 429])
@pytest.mark.parametrize("part", ["api/", "/resolve/"])
def test_an_outage(status: int, part: str, hub: Hub) -> None:
    hub.add("owner/tiny", MODEL)
    hub.failing_on, hub.failing_with = part, status
    with pytest.raises(ModelError, match=rf"the hub answered with an error \({status}\)"):
        model_folder("owner/tiny")


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/tiny", MODEL)

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(ModelError, match="the disk is full") as caught:
        model_folder("owner/tiny")
    assert "HF_HOME" in caught.value.problems[0].hint
    assert "Traceback" not in str(caught.value)


# Datasets


def split_names(
    hub: Hub, files: Iterable[str], split: str | None = "train", *, card: str = "", config: str | None = None
) -> list[str]:
    """The files that make up `split` of a dataset of `files` whose card has the YAML header `card`."""
    readme = {"README.md": f"---\nlicense: mit\n{card}\n---\n# Rows\n---\n"} if card else {}
    revision = hub.add("datasets/owner/rows", {**dict.fromkeys(files, "content"), **readme})
    found = dataset_files("owner/rows", split=split, config=config)
    assert found.revision == revision
    assert all(path.read_text() == "content" for path in found.paths)
    return [path.as_posix().partition(f"/{revision}/")[2] for path in found.paths]


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (
            ["b.json", "a.json", "rows.py", "notes.txt", "dataset_infos.json", ".cache/c.json"],
            "train",
            "a.json b.json",
        ),
        (["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"], "train", None),
        (["train.jsonl.gz", "test.jsonl.gz", "other.csv.gz"], "test", "test.jsonl.gz"),
        (["en/dev/1.csv", "en/train/1.csv"], "validation", "en/dev/1.csv"),
        (["my-train-2.json", "Evaluation_x.json", "eval.json"], "test", "Evaluation_x.json eval.json"),
        (["data/sft-00000-of-00002.parquet", "data/sft-00001-of-00002.parquet"], "sft", None),
        (["train/test.json", "train/rest.json"], "train", "train/rest.json"),
        (["train.parquet", "train.json", "train.py"], "train", "train.parquet"),
        (["train-1.json", "train-2.jsonl", "train.parquet"], "train", "train-1.json train-2.jsonl"),
        (["a [1].json", "[ab].json", "a.json"], "train", None),
        (["train.csv.gz", "test.csv.gz"], "train", "train.csv.gz"),
        (["train.tsv", "README.md", "LICENSE.txt"], "train", "train.tsv"),
        (["rows.jsonl.zst", "test.jsonl.zst"], "train", "rows.jsonl.zst"),
        (["train.txt", "valid.txt"], "validation", "valid.txt"),
        (["a.parquet", "a.txt", "b.txt"], "train", "a.parquet"),
        (["train.json", "dev.json", "test.json"], None, "dev.json"),
        (["train.json", "eval.json"], None, "eval.json"),
        (["rows.json"], None, "rows.json"),
    ],
)
def test_splits_by_file_names(files: list[str], split: str, expected: str | None, hub: Hub) -> None:
    assert split_names(hub, files, split) == (sorted(files) if expected is None else expected.split())
    assert not [request for request in hub.requests if request.endswith(".py")]


@pytest.mark.parametrize(
    ("config", "split", "expected"),
    [
        ("data_files: a.json", "train", "a.json"),
        ("data_files: [a.json, 'c/*.json']", "train", "a.json c/test.json"),
        ("data_files: '**/*.json'", "train", "a.json b.json c/d/e.json c/test.json"),
        ("data_files: ['?.json']", "train", "a.json b.json"),
        (
            "data_files: [{split: sft, path: a.json}, {split: test, path: [b.json, './c/*']}]",
            "test",
            "b.json c/test.json",
        ),
        ("data_files: {sft: a.json, dpo: ['c/**']}", "dpo", "c/d/e.json c/test.json"),
        ("data_dir: c", "test", "c/test.json"),
        ("{data_dir: ./c/, data_files: 'd/*'}", "train", "c/d/e.json"),
    ],
)
def test_splits_of_the_card(config: str, split: str, expected: str, hub: Hub) -> None:
    files = ["a.json", "b.json", "c/test.json", "c/d/e.json"]
    card = f"configs:\n- {config}\n"
    assert split_names(hub, files, split, card=card) == expected.split()


def test_the_default_configuration_is_used(hub: Hub) -> None:
    files = ["a.json", "b.json"]
    card = "configs:\n- {config_name: x, data_files: a.json}\n- {config_name: y, data_files: b.json%s}"
    assert split_names(hub, files, card=card % ", default: true") == ["b.json"]
    assert split_names(hub, files, card=(card % "").replace("name: x", "name: default")) == ["a.json"]
    with pytest.raises(DataError, match="several configurations and no default one: x, y") as caught:
        split_names(hub, files, card=card % "")
    assert caught.value.problems[0].hint == "data.config=x or another one"
    assert split_names(hub, files, card=card % "", config="y") == ["b.json"]
    assert split_names(hub, files, card=card % ", default: true", config="x") == ["a.json"]
    with pytest.raises(DataError, match="has no configuration `z`; it has x, y"):
        split_names(hub, files, card=card % "", config="z")
    with pytest.raises(DataError, match="names no configurations") as caught:
        split_names(hub, files, config="z")
    assert caught.value.problems[0].hint == "leave data.config out"


@pytest.mark.parametrize("card", ["configs: [", "configs: 3", "configs: [3]", "- 1", "tags: [a]"])
def test_a_card_without_configurations_leaves_it_to_the_names(card: str, hub: Hub) -> None:
    hub.add("datasets/owner/rows", {"a.json": "[]", "README.md": f"---\n{card}\n---\n"})
    assert [path.name for path in dataset_files("owner/rows").paths] == ["a.json"]


def test_an_unknown_split_lists_those_there_are(hub: Hub) -> None:
    with pytest.raises(DataError, match="no data for the split `dev`") as caught:
        split_names(hub, ["train.json", "valid.json"], "dev")
    assert "train, validation" in caught.value.problems[0].hint
    with pytest.raises(DataError) as caught:
        split_names(hub, ["rows.py", "rows.zip"])
    assert "it has no files .json .jsonl" in caught.value.problems[0].hint


def test_a_dataset_revision_pins_the_files(hub: Hub) -> None:
    old = hub.add("datasets/owner/rows", {"train.json": "old"})
    hub.add("datasets/owner/rows", {"train.json": "new"})
    assert dataset_files("owner/rows").paths[0].read_text() == "new"
    assert dataset_files("owner/rows", revision=old).paths[0].read_text() == "old"


@pytest.mark.parametrize("suffix", FILE_KINDS)
def test_every_kind_of_file_that_is_read_here_is_detected_on_the_hub(hub: Hub, suffix: str) -> None:
    files = [f"train{suffix}", f"nested/test{suffix.upper()}", "README.md"]
    assert split_names(hub, files) == [f"train{suffix}"]
    assert split_names(hub, files, "test") == [f"nested/test{suffix.upper()}"]
    assert suffix_of(f"train{suffix}") == suffix
