"""Compiled kernels are loaded from a folder of one's own, and only as they were compiled."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.model import native

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORAFIT_NATIVE", raising=False)
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }')
    return tmp_path / "cache" / "native"


def load(cache: Path) -> tuple[int | None, str]:
    library, why = native._compiled((str(cache.parent.parent / "one.cpp"),), ("-O0",))
    return library and library.one(), why


def foreign(library: Path) -> None:
    """Put another library in the place of `library`; to load it leaves a trace."""
    source = library.with_suffix(".cpp")
    trace = library.with_suffix(".trace")
    source.write_text(
        f'#include <cstdio>\nextern "C" int one() {{ return 2; }}\n'
        f'__attribute__((constructor)) static void loaded() {{ fopen("{trace}", "w"); }}'
    )
    assert os.system(f"c++ -shared -fPIC -o {library} {source}") == 0
    source.unlink()


def test_a_library_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(cache) == (1, "")
    [library] = cache.glob("*.so")
    assert library.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(native, "_compile", None)
    assert load(cache) == (1, "")


@pytest.mark.parametrize("change", ["another", "cut", "no digest", "another digest", "for others to write"])
def test_a_library_that_is_not_as_it_was_compiled_is_not_loaded(change: str, cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    cache.parent.chmod(0o700)
    assert native._compiled((str(cache.parent.parent / "one.cpp"),), ("-O0",))[1] == ""
    [library] = cache.glob("*.so")
    digest = library.with_suffix(".sha256")
    before = library.stat().st_ino
    if change == "another":
        foreign(library)
    elif change == "cut":
        library.rename(cache / "old")  # the loaded one stays as it is
        library.write_bytes((cache / "old").read_bytes()[:-100])
    elif change == "no digest":
        digest.unlink()
    elif change == "another digest":
        digest.write_text("0" * 64)
    else:
        library.chmod(0o722)
    assert load(cache) == (1, "")
    assert library.stat().st_ino != before
    assert not list(cache.glob("*.trace"))


@pytest.mark.parametrize("level", ["native", ""])
def test_kernels_of_a_folder_that_others_can_write_are_done_without(
    level: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(cache)[0] == 1
    foreign(next(cache.glob("*.so")))
    (cache.parent / level).chmod(0o777)
    loaded = []
    monkeypatch.setattr(ctypes, "CDLL", loaded.append)
    library, why = load(cache)
    assert library is None
    assert "can be written by other users" in why
    assert not loaded


@pytest.mark.parametrize("processor", ["sapphirerapids", pytest.param("cooperlake", marks=pytest.mark.slow)])
def test_sources_with_dot_products_compile_for_processors_that_have_them(processor: str) -> None:
    """Another processor leaves these lines out, and one source that does not compile leaves all kernels out."""
    folder = Path(native.__file__).parent
    sources = [path for path in sorted(folder.glob("*.cpp")) if '"dots.h"' in path.read_text("utf-8")]
    assert len(sources) >= 3
    compiler = shutil.which("g++") or "c++"
    known = [compiler, f"-march={processor}", "-x", "c++", "-fsyntax-only"]
    if subprocess.run([*known, os.devnull], capture_output=True, check=False).returncode:
        pytest.skip(f"the compiler does not know {processor}")
    done = subprocess.run(
        [*known, "-std=c++17", "-fopenmp", *sources], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_threads_that_wait_sleep_soon_unless_the_user_has_chosen(given: dict[str, str]) -> None:
    """libgomp says at its start what it has read. It is loaded without torch, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    library = (
        next((Path(spec.origin).parent / "lib").glob("libgomp*"), None) if spec and spec.origin else None
    )
    if library is None:
        pytest.skip("torch has no libgomp")
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"import lorafit, ctypes; ctypes.CDLL({str(library)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "OMP_DISPLAY_ENV": "verbose", **given},
        capture_output=True,
        text=True,
        check=True,
    )
    turns = {"": "10000", "GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": "30000000000"}["".join(given)]
    assert f"GOMP_SPINCOUNT = '{turns}'" in done.stderr
