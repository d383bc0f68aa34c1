"""What this machine has and lacks for lorafit: one result per line, for the user and for bug reports.

No connection is opened, nothing is changed, and no secret is shown. Torch is examined in a process of its own, at the
same time as the rest.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement  # a dependency of huggingface_hub

from lorafit.errors import CheckResult, LorafitError, Outcome
from lorafit.observe.units import memory_size
from lorafit.storage.atomic import existing
from lorafit.storage.cache_dir import cache_home
from lorafit.version import __version__

PROBE = [sys.executable, "-m", "lorafit.check.machine_probe"]
_PROBE_SECONDS = 60
_LITTLE_DISK, _LITTLE_MEMORY = 5 * 10**9, 2 * 10**9
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")
_SHOWN = (  # variables that change what lorafit does, and hold no secret
    *("LORAFIT_CACHE", "LORAFIT_NATIVE", "CXX", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "LC_ALL", "LANG"),
)
_FOR_DEVELOPERS = ("test", "bench", "dev", "docs")


def examine() -> list[CheckResult]:
    """All results, in the order of the screen. Nothing is raised for what is wrong with the machine."""
    with subprocess.Popen(  # noqa: S603 (this program)
        PROBE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        before = [_versions(), *_packages()]
        after = [*_disks(), *_hub(), _proxies(), _environment()]
        try:
            out, err = process.communicate(timeout=_PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            out, err = "", f"no answer in {_PROBE_SECONDS} seconds"
    return [*before, *_torch(out, err), *after]


def _result(name: str, message: str, verdict: Outcome = "pass", hint: str = "") -> CheckResult:
    return CheckResult(name, verdict, _without_home(message), hint=_without_home(hint))


def _without_home(text: str) -> str:
    home = os.path.expanduser("~")  # noqa: PTH111  never raises
    return text.replace(home, "~") if len(home) > 1 else text


def _versions() -> CheckResult:
    return _result(
        "lorafit",
        f"{__version__} with Python {platform.python_version()} on {platform.platform()}",
    )


def _packages() -> Iterator[CheckResult]:
    """The direct dependencies, and the extras of users."""
    try:
        metadata = importlib.metadata.metadata("lorafit")
        required = [Requirement(text) for text in importlib.metadata.requires("lorafit") or []]
    except importlib.metadata.PackageNotFoundError:
        yield _result("packages", "lorafit is not installed as a package", "warn", "pip install lorafit")
        return
    direct = [need for need in required if need.marker is None or need.marker.evaluate({"extra": ""})]
    faults = list(filter(None, map(_fault, direct)))
    found = ", ".join(f"{need.name} {_installed(need.name)}" for need in direct if _installed(need.name))
    if faults:
        yield _result("packages", "; ".join(faults), "fail", "pip install --upgrade lorafit")
    yield _result("packages", found)
    extras = []
    for extra in sorted(set(metadata.get_all("Provides-Extra") or []) - {*_FOR_DEVELOPERS}):
        needs = [
            need
            for need in required
            if need.marker and need.marker.evaluate({"extra": extra}) and need not in direct
        ]
        extras.append(f"{extra} {'no' if any(map(_fault, needs)) else 'yes'}")
    yield _result("extras", ", ".join(extras) or "none")


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _fault(need: Requirement) -> str:
    """Why a requirement is not met, "" if it is."""
    version = _installed(need.name)
    if not version:
        return f"{need.name} is missing"
    return (
        "" if need.specifier.contains(version, prereleases=True) else f"{need.name} {version} is not {need}"
    )


def _torch(out: str, err: str) -> Iterator[CheckResult]:
    """Torch, the driver, the kernels and the memory, from the answer of the probe."""
    try:
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        reason = (err.strip().splitlines() or ["it ended without an answer"])[-1]
        hint = "reinstall torch for this machine (pytorch.org/get-started)"
        yield _result("torch", f"torch {_installed('torch')} cannot be used: {reason}", "fail", hint)
        yield _driver("")
        return
    build = f"CUDA {found['cuda']}" if found["cuda"] else "no CUDA"
    yield _result("torch", f"{found['torch']} ({build}), device {found['device']}, dtype {found['dtype']}")
    yield _driver(found["device"])
    memory = "" if found["device_bytes"] is None else f", {memory_size(found['device_bytes'])} free"
    yield _result("device", found["name"] + (memory if found["device"] != "cpu" else ""))
    free = found["memory_bytes"]
    hint = (
        "close other programs; `lorafit plan` predicts the memory of a run" if free < _LITTLE_MEMORY else ""
    )
    yield _result("memory", f"{memory_size(free)} available", "warn" if hint else "pass", hint)
    if found["kernels_cached"]:
        yield _result("kernels", "the CPU kernels are compiled and cached")
    elif not found["kernels_missing"]:
        yield _result("kernels", "the compiler works; the CPU kernels are compiled at the first use")
    else:
        hint = "torch's own kernels are used on a CPU, which are slower; install g++ or clang++ with OpenMP"
        yield _result("kernels", f"no CPU kernels: {found['kernels_missing']}", "warn", hint)


def _driver(device: str) -> CheckResult:
    """The driver of NVIDIA, and whether torch uses it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return _result("driver", "no NVIDIA driver")
    query = ["--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(  # noqa: S603 (the driver's own tool)
            [command, *query], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return _result("driver", f"nvidia-smi failed: {error}", "warn", "reinstall the driver of the GPU")
    lines = ", ".join(done.stdout.strip().splitlines())
    if done.returncode:
        reason = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        return _result("driver", f"nvidia-smi failed: {reason[0]}", "warn", "reinstall the driver of the GPU")
    if device and device != "cuda":
        hint = "install a torch build with CUDA (pytorch.org/get-started); see also CUDA_VISIBLE_DEVICES"
        return _result("driver", f"{lines}, but torch uses the {device}", "warn", hint)
    return _result("driver", lines)


def _disks() -> Iterator[CheckResult]:
    """The folders that lorafit writes: whether they can be written, and the room there."""
    from huggingface_hub import constants

    runs = Path.cwd()
    yield _folder("runs", runs, "go to a folder that you can write, or give --output")
    yield _folder("cache", cache_home(), "set LORAFIT_CACHE to a folder that you can write")
    yield _folder("hub cache", Path(constants.HF_HUB_CACHE), "set HF_HOME to a folder that you can write")


def _folder(name: str, folder: Path, hint: str) -> CheckResult:
    try:
        there = existing(folder)
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        return _result(name, f"{folder} cannot be written: {error.strerror or error}", "warn", hint)
    if free < _LITTLE_DISK:
        hint = "free some space: a model of 7 billion parameters takes 15 GB"
        return _result(name, f"{folder}, {memory_size(free)} free", "warn", hint)
    return _result(name, f"{folder}, {memory_size(free)} free")


def _hub() -> Iterator[CheckResult]:
    """Endpoint and login of the hub. No connection is opened, so a token is not verified."""
    from huggingface_hub import constants

    from lorafit.hub.client import token

    endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
    offline = " (offline: HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    if endpoint.scheme not in ("http", "https") or not endpoint.netloc:
        hint = "HF_ENDPOINT is an address such as https://huggingface.co"
        yield _result("hub", f"`{_without_login(constants.ENDPOINT)}` is no address", "fail", hint)
    else:
        yield _result("hub", _without_login(constants.ENDPOINT) + offline)
    try:
        has_token = token() is not None
    except (LorafitError, OSError) as error:
        hint = error.problems[0].hint if isinstance(error, LorafitError) else ""
        yield _result("login", str(getattr(error, "problems", [error])[0]).split("\n")[0], "fail", hint)
        return
    without = "no token: gated and private repositories need one (`hf auth login` or HF_TOKEN)"
    yield _result("login", "a token is there (it is not shown)" if has_token else without)


def _without_login(address: str) -> str:
    return re.sub(r"^([^/]*//)?[^/]*@", r"\1***@", address)


def _proxies() -> CheckResult:
    found = {
        name: value
        for name in _PROXIES
        if (value := os.environ.get(name) or os.environ.get(name.lower(), "")).strip()
    }
    text = ", ".join(f"{name}={_without_login(value)}" for name, value in found.items()) or "none"
    for name, value in found.items():
        scheme = value.partition("://")[0].lower() if "://" in value else "http"
        if name != "NO_PROXY" and scheme not in ("http", "https", "socks5", "socks5h"):
            hint = f"{name} is an address such as http://HOST:PORT or socks5://HOST:PORT"
            return _result("proxies", text, "fail", hint)
        if scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
            return _result("proxies", f"{text}: socksio is missing", "fail", "pip install 'httpx[socks]'")
    return _result("proxies", text)


def _environment() -> CheckResult:
    values = {name: os.environ[name] for name in _SHOWN if os.environ.get(name)}
    shown = ", ".join(f"{name}={_without_login(value)}" for name, value in values.items())
    encodings = f"text is {sys.stdout.encoding}, file names are {sys.getfilesystemencoding()}"
    return _result("settings", f"{encodings}; {shown or 'no variables are set'}")
