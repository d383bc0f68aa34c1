"""`lorafit doctor`: each line says what it must in a broken environment, and no secret appears."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from tests.command import COMMAND, Cli
from tests.waiting import HANGS

from lorafit.check import doctor

NAMES = [
    *("lorafit", "packages", "extras", "torch", "driver", "device", "memory", "kernels"),
    *("runs", "cache", "hub cache", "hub", "login", "proxies", "settings"),
]
FOUND = {
    "torch": "9.9",
    "cuda": None,
    "device": "cpu",
    "name": "CPU, 2 threads",
    "dtype": "bfloat16",
    "device_bytes": 9 * 10**9,
    "memory_bytes": 9 * 10**9,
    "kernels_cached": True,
    "kernels_missing": "",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch's answer without torch, and no variable or file of the user's."""
    answer(monkeypatch)
    for name in (*doctor._PROXIES, *map(str.lower, doctor._PROXIES), "HF_TOKEN", "CXX", "LORAFIT_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)


def answer(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    monkeypatch.setattr(
        doctor, "PROBE", [sys.executable, "-c", f"print({json.dumps({**FOUND, **changes})!r})"]
    )


def lines(cli: Cli) -> tuple[int, dict[str, tuple[str, str, str]]]:
    """The exit code, and (verdict, message, hint) by name; both forms of the output say the same."""
    done = cli("doctor", "--json")
    results = [json.loads(line) for line in done.out.splitlines()]
    plain = cli("doctor")
    assert (done.err, plain.err, plain.code) == ("", "", done.code)
    for result, line in zip(results, plain.out.splitlines(), strict=True):
        assert line.startswith(f"{result['verdict']:<4}  {result['name']}")
        assert result["hint"] in line
    return done.code, {r["name"]: (r["verdict"], r["message"], r["hint"]) for r in results}


def test_a_machine_that_lacks_nothing(cli: Cli) -> None:
    code, found = lines(cli)
    assert (code, list(found)) == (0, NAMES)
    assert {verdict for verdict, _, _ in found.values()} == {"ok"}
    assert found["torch"][1] == "9.9 (no CUDA), device cpu, dtype bfloat16"
    assert found["memory"][1] == "9.0 GB available"
    assert "numpy" in found["packages"][1]
    assert "serve yes" in found["extras"][1]
    assert "no token" in found["login"][1]


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("raise ImportError('libtorch.so: cannot open')", "ImportError: libtorch.so: cannot open"),
        ("import os; os.kill(os.getpid(), 11)", "it ended without an answer"),
        ("print('not json')", "it ended without an answer"),
    ],
    ids=["import", "crash", "noise"],
)
def test_a_torch_that_cannot_be_used_fails_and_the_rest_is_shown(
    program: str, says: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PROBE", [sys.executable, "-c", program])
    code, found = lines(cli)
    assert code == 1
    assert found["torch"][0] == "fail"
    assert says in found["torch"][1]
    assert "reinstall torch" in found["torch"][2]
    assert {"packages", "driver", "cache", "login"} <= set(found)


def test_a_torch_that_hangs_is_given_up(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE", [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 0.01)
    code, found = lines(cli)
    assert (code, found["torch"][0]) == (1, "fail")
    assert "no answer" in found["torch"][1]


def test_a_compiler_that_is_missing_and_little_memory_are_warnings(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, kernels_cached=False, kernels_missing="there is no C++ compiler", memory_bytes=10**9)
    code, found = lines(cli)
    assert code == 0
    assert found["kernels"][:2] == ("warn", "no CPU kernels: there is no C++ compiler")
    assert "install g++" in found["kernels"][2]
    assert (found["memory"][0], "lorafit plan" in found["memory"][2]) == ("warn", True)
    answer(monkeypatch, kernels_cached=False)
    assert lines(cli)[1]["kernels"][:2] == (
        "ok",
        "the compiler works; the CPU kernels are compiled at the first use",
    )


@pytest.mark.parametrize("works", [True, False])
def test_a_driver_that_torch_does_not_use_is_a_warning(
    works: bool, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'H200, 570.1'\n" if works else "#!/bin/sh\necho 'no devices'; exit 9\n")
    tool.chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(tool))
    _, found = lines(cli)
    assert found["driver"][0] == "warn"
    assert ("H200, 570.1, but torch uses the cpu" if works else "failed: no devices") in found["driver"][1]
    answer(monkeypatch, cuda="12.8", device="cuda", name="H200, 140 GB")
    assert lines(cli)[1]["driver"][0] == ("ok" if works else "warn")
    assert lines(cli)[1]["device"][1] == "H200, 140 GB, 9.0 GB free"


def test_folders_that_cannot_be_written_are_named_with_what_to_set(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:  # noqa: A002
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    code, found = lines(cli)
    assert code == 0
    for name, hint in (("runs", "--output"), ("cache", "LORAFIT_CACHE"), ("hub cache", "HF_HOME")):
        assert found[name][0] == "warn"
        assert "cannot be written: Permission denied" in found[name][1]
        assert hint in found[name][2]


def test_a_cache_below_a_file_cannot_be_written(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "file" / "cache"))
    assert lines(cli)[1]["cache"][0] == "warn"


def test_a_full_disk_is_a_warning(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    _, found = lines(cli)
    assert {found[name][0] for name in ("runs", "cache", "hub cache")} == {"warn"}
    assert "1.0 GB free" in found["cache"][1]


SECRETS = ["hf_abcdefghijklmnopqrstuvwx", "pa55word", "pr0xyuser", "endp0int"]


@pytest.mark.parametrize("place", ["environment", ".env", "login"])
def test_no_secret_is_shown_and_the_login_is(
    place: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "environment":
        monkeypatch.setenv("HF_TOKEN", SECRETS[0])
    elif place == ".env":
        Path(".env").write_text(f"HF_TOKEN={SECRETS[0]}\n")
    else:
        (tmp_path / "token").write_text(SECRETS[0])
    monkeypatch.setenv("HTTPS_PROXY", "http://pr0xyuser:pa55word@proxy.example:3128")
    monkeypatch.setenv("http_proxy", "pr0xyuser:pa55word@proxy.example:3128")
    monkeypatch.setenv("ALL_PROXY", "socks5://pr0xyuser@proxy.example:1080")
    monkeypatch.setenv("HF_ENDPOINT", "https://endp0int:pa55word@mirror.example")
    monkeypatch.setattr(constants, "ENDPOINT", "https://endp0int:pa55word@mirror.example")
    code, found = lines(cli)
    assert code == 0
    shown = cli("doctor").out + cli("doctor", "--json").out
    assert not [secret for secret in SECRETS if secret in shown]
    assert found["login"][:2] == ("ok", "a token is there (it is not shown)")
    assert "HTTPS_PROXY=http://***@proxy.example:3128" in found["proxies"][1]
    assert "ALL_PROXY=socks5://***@proxy.example:1080" in found["proxies"][1]
    assert found["hub"][1] == "https://***@mirror.example"


@pytest.mark.parametrize(
    ("name", "value", "line", "hint"),
    [
        ("ALL_PROXY", "ftp://proxy.example", "proxies", "socks5://HOST:PORT"),
        ("HF_TOKEN", "two words", "login", "copy it again"),
    ],
)
def test_settings_that_cannot_work_fail(
    name: str, value: str, line: str, hint: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    code, found = lines(cli)
    assert (code, found[line][0]) == (1, "fail")
    assert hint in found[line][2]
    assert "two words" not in str(found)


@pytest.mark.parametrize("endpoint", ["mirror.example", "://", "file:///etc"])
def test_an_endpoint_that_is_no_address_fails(
    endpoint: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    code, found = lines(cli)
    assert (code, found["hub"][0]) == (1, "fail")
    assert "HF_ENDPOINT" in found["hub"][2]


def test_a_package_that_is_too_old_or_missing_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._installed
    for version in ("", "0.1"):
        monkeypatch.setattr(
            doctor, "_installed", lambda name, v=version: v if name == "pydantic" else real(name)
        )
        done = cli("doctor")
        assert done.code == 1
        (line,) = [line for line in done.out.splitlines() if line.startswith("fail")]
        assert ("pydantic is missing" if version == "" else "pydantic 0.1 is not pydantic<3,>=2.10") in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "kernels"),
    [
        ({}, ""),
        ({"LORAFIT_NATIVE": "0"}, "LORAFIT_NATIVE=0"),
        ({"CXX": "/nowhere/c++", "LORAFIT_CACHE": "NEW"}, "/nowhere/c++"),
        ({"CXX": "/bin/false", "LORAFIT_CACHE": "NEW"}, "`/bin/false` failed: exit code 1"),
    ],
    ids=["as it is", "switched off", "no compiler", "broken compiler"],
)
def test_the_real_torch_is_asked(environment: dict[str, str], kernels: str, tmp_path: Path) -> None:
    given = {name: str(tmp_path / "new") if value == "NEW" else value for name, value in environment.items()}
    env = {**os.environ, **given}
    done = subprocess.run(
        [*COMMAND, "doctor"], env=env, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    (line,) = [line for line in done.stdout.splitlines() if "  kernels " in line]
    assert line.startswith("warn" if kernels else "ok")
    assert kernels in line
    assert not (tmp_path / "new").exists()  # nothing is changed
