"""The built wheel and sdist: what is in them, and that the wheel alone trains, answers and exports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tests.waiting import HANGS

pytest.importorskip("hatchling", reason="the build backend is missing: pip install '.[test]'")

ROOT = Path(__file__).resolve().parents[2]


def build(source: Path, target: str, into: Path) -> Path:
    """The `wheel` or `sdist` of the tree `source`, built here without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", into]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=HANGS)
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


def tracked(*folders: str) -> set[str]:
    """The files of the clone that exist and that git does not ignore, below `folders`."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("only git knows which files belong to the project: this is no clone")
    command = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-per-directory=.gitignore",
        "-z",
        "--",
        *folders,
    ]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def test_the_wheel_has_the_package_the_recipes_the_demo_and_the_licence_only(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name.removeprefix("src/") for name in tracked("src/lorafit")}
    recipes = {f"lorafit/{name}" for name in tracked("recipes")}
    demo = {
        f"lorafit/{name}"
        for part in ("model", "rows.json", "recipe.yaml")
        for name in tracked(f"demo/{part}")
    }
    about = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    own = {
        f"{about}/{name}" for name in ("METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE", "RECORD")
    }
    assert names == package | recipes | demo | own
    assert "lorafit/py.typed" in names
    assert {Path(name).suffix for name in package} >= {".py", ".cpp", ".h", ".css", ".js"}


def test_the_sdist_has_every_file_of_the_clone(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == tracked() | {"PKG-INFO"}


def test_a_wheel_out_of_the_sdist_has_the_same_bytes(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = build(source, "wheel", tmp_path / "dist")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


def test_the_metadata_is_accepted_without_a_warning(wheel: Path, sdist: Path) -> None:
    pytest.importorskip("twine", reason="twine is missing: pip install '.[dev]'")
    command = [sys.executable, "-m", "twine", "check", "--strict", wheel, sdist]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


class Installed:
    """A virtual environment that has the wheel, and its dependencies from the environment of the tests."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.folder = folder / "venv"
        self.work = folder / "work"
        self.work.mkdir()
        venv.create(self.folder, symlinks=os.name != "nt")
        self.bin = self.folder / ("Scripts" if os.name == "nt" else "bin")
        # The wheel first: pip would otherwise find the lorafit of the tests and install nothing.
        options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
        python = str(self.bin / "python")
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", python, "install", "-q", *options, wheel],
            check=True,
            capture_output=True,
            timeout=HANGS,
        )
        (self.site,) = self.folder.glob("[Ll]ib/**/site-packages")
        # Plain paths: the .pth files in those folders, an editable lorafit among them, are not read.
        shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.site / "dependencies.pth").write_text("\n".join(shared), encoding="utf-8")

    def run(self, program: str, *words: object) -> str:
        """What `program` of the environment prints, far from the clone and without a network."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [self.bin / program, *map(str, words)],
            cwd=self.work,
            env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=HANGS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


LOOK = """
import importlib.metadata, json, sys
import lorafit
from lorafit.config.load import recipe_file, recipes_folder
from lorafit.model import native
print(json.dumps({
    "file": lorafit.__file__,
    "path": sys.path,
    "version": importlib.metadata.version("lorafit"),
    "recipes": sorted(path.name for path in recipes_folder().iterdir()),
    "classic": str(recipe_file("classic")),
    "missing": native.missing(),
    "blocks": native.blocks() is not None,
}))
"""


@pytest.mark.slow
def test_the_installed_package_has_its_version_recipes_and_kernels(installed: Installed) -> None:
    from lorafit.model import native

    told = json.loads(installed.run("python", "-c", LOOK))
    assert Path(told["file"]).is_relative_to(installed.site)
    assert [path for path in told["path"] if (Path(path) / "lorafit/__init__.py").exists()] == [
        str(installed.site)
    ]
    assert installed.run("lorafit", "--version") == f"lorafit {told['version']}\n"
    assert told["recipes"] == sorted(path.name for path in (ROOT / "recipes").iterdir())
    assert Path(told["classic"]).is_relative_to(installed.site)
    assert (told["missing"], told["blocks"]) == (native.missing(), native.blocks() is not None)


@pytest.mark.slow
def test_the_installed_program_trains_answers_and_exports(installed: Installed) -> None:
    pytest.importorskip("gguf", reason="gguf is missing: pip install '.[test]'")
    shutil.copytree(ROOT / "demo/model", installed.work / "model")
    shutil.copy(ROOT / "demo/rows.json", installed.work)
    settings = ["model.dtype=float32", "data.max_length=128", "train.max_steps=2", "run.offline=true"]
    installed.run(
        "lorafit", "train", "classic", "--model", "model", "--data", "rows.json", "--output", "run", *settings
    )
    adapter = load_file(installed.work / "run/adapter/adapter_model.safetensors")
    assert all(tensor.any() for tensor in adapter.values())
    assert "<style>" in (installed.work / "run/report.html").read_text(encoding="utf-8")
    answers = installed.run("lorafit", "generate", "run", "Where does a cow live?", "--json").splitlines()
    assert len(answers) == 1
    for kind, options in (("merged", ["--no-verify"]), ("gguf", [])):  # one comparison is enough here
        told = json.loads(installed.run("lorafit", "export", "run", kind, "--offline", "--json", *options))
        assert told["kind"] == kind
        assert told["parity"]["verified"] is (kind == "gguf"), told["parity"]
