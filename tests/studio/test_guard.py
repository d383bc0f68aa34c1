"""Every address of the studio refuses other sites, wrong tokens and path tricks, and no page runs foreign text."""

from __future__ import annotations

import re
import socket
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.routing import Route
from tests.report.runs import HOSTILE, write_run
from tests.report.test_report import Structure
from tests.studio.pages import PORT, TOKEN, URL, Studio

from lorafit.errors import ConfigError
from lorafit.studio.server import TOKEN_VARIABLE, run_studio

OTHER = "http://evil.example"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = tmp_path_factory.mktemp("studio")
    write_run(folder / "plain", 50)
    write_run(folder / "hostile", 50, lambda text: text + "".join(HOSTILE))
    studio = Studio(folder)
    studio.app.state.models = [{"model": "owner/name", "fits": "yes"}]  # else a process measures them
    return studio


def addresses(studio: Studio) -> Iterator[tuple[str, str]]:
    """(method, path) of every route, with ids that exist where there are some."""
    for route in studio.app.routes:
        assert isinstance(route, Route)
        path = route.path.replace("{run}", studio.ids()["plain"]).replace("{name}", "page.js")
        for method in route.methods or ():
            yield method, re.sub(r"{\w+}", "0" * 16, path)


def test_no_address_answers_without_the_token(studio: Studio) -> None:
    for method, path in addresses(studio):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": f"lorafit-studio-{PORT}=wrong"}):
            reply = studio.ask(path, method, token=False, headers=headers)
            assert reply.status_code == 401, (method, path, headers)
            assert "demo/model" not in reply.text


def test_no_address_answers_another_site_or_host(studio: Studio) -> None:
    for method, path in addresses(studio):
        for headers in (
            {"origin": OTHER},
            {"origin": "null"},
            {"host": "evil.example"},
            {"host": f"{URL}.x"},
        ):
            reply = studio.ask(path, method, headers=headers)
            assert reply.status_code == 403, (method, path, headers)
            assert "--allow-host" not in reply.text, "the studio has no such option"


def test_the_cookie_serves_the_studios_own_pages_only(studio: Studio) -> None:
    cookie = {"cookie": f"other=1; lorafit-studio-{PORT}={TOKEN}"}

    def status(method: str = "GET", **headers: str) -> int:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return studio.ask(
            "/" if method == "GET" else "/language", method, token=False, headers=cookie | sent
        ).status_code

    assert status() == 200
    assert status(sec_fetch_site="same-origin") == status(sec_fetch_site="none") == 200
    assert status(sec_fetch_site="cross-site") == status(sec_fetch_site="same-site") == 401
    assert status("POST") == 401, "a browser names the origin of each POST"
    assert status("POST", origin=URL) == 303
    assert status("POST", origin=OTHER) == 403
    twice = {"cookie": f"lorafit-studio-{PORT}=x; lorafit-studio-{PORT}={TOKEN}"}
    assert studio.ask("/", token=False, headers=twice).status_code == 401
    other_port = {"cookie": f"lorafit-studio-{PORT + 1}={TOKEN}"}
    assert studio.ask("/", token=False, headers=other_port).status_code == 401


def test_the_printed_address_gives_the_cookie_and_no_other_does(studio: Studio) -> None:
    reply = studio.ask(f"/open?token={TOKEN}", token=False)
    cookie = reply.headers["set-cookie"]
    assert f"lorafit-studio-{PORT}={TOKEN}" in cookie
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    for query in ("", "?token=", "?token=wrong", f"?token={TOKEN}x"):
        refused = studio.ask(f"/open{query}", token=False)
        assert refused.status_code == 401
        assert "set-cookie" not in refused.headers


@pytest.mark.parametrize("trick", [
    "/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static/page.css%00.js", "/static/",
    "/runs/..", "/runs/../../etc/passwd", "/runs/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/runs/%00", "/runs/plain",
    "/runs/.", "/jobs/../../x", "/jobs/%2e%2e%2fx", "//evil.example/", "/runs/{run}/../../secret",
])  # fmt: skip
def test_no_path_leads_to_a_file(studio: Studio, trick: str) -> None:
    status, text = studio.raw(trick)
    assert status in (400, 404), trick
    assert "root:" not in text
    assert "def " not in text


def test_the_language_leads_back_to_the_studio_only(studio: Studio) -> None:
    for back in ("https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)"):
        reply = studio.ask(f"/language?to=ko&back={back}", "POST")
        assert reply.headers["location"] == "/", back
    assert studio.ask("/language?to=ko&back=/new", "POST").headers["location"] == "/new"


def test_hostile_runs_are_text_in_every_page_and_language(studio: Studio) -> None:
    ids = studio.ids()
    for suffix in ("", "/live"):
        for language in ("en", "ko"):
            plain, hostile = (
                studio.ask(f"/runs/{ids[name]}{suffix}", headers={"accept-language": language})
                for name in ("plain", "hostile")
            )
            assert plain.status_code == hostile.status_code == 200
            assert Structure.of(plain.text).tags == Structure.of(hostile.text).tags
    assert "&lt;U+202E&gt;" in studio.ask(f"/runs/{ids['hostile']}").text


def test_no_page_holds_what_the_policy_refuses(studio: Studio) -> None:
    """No inline script, style or handler, nothing from elsewhere; and the policy is on every reply."""
    for method, path in addresses(studio):
        if method != "GET" or path == "/events":
            continue
        reply = studio.ask(path)
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        if "text/html" not in reply.headers["content-type"]:
            continue
        for tag, names in Structure.of(reply.text).tags:
            assert "style" not in names, (path, tag)
            assert not [name for name in names if name.startswith("on")], (path, tag)
            assert tag != "style", path
            assert tag != "script" or "src" in names, path
        assert not re.findall(r"""(?:src|href|action)=["'](?:\w+:)?//""", reply.text), path


def test_a_run_that_is_no_run_is_told_and_breaks_no_page(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.yaml").write_bytes(b"\xff\x00: [")
    (bad / "metrics.jsonl").write_bytes(
        b"[1]\nnull\n\xff\xfe\n" + b"x" * 3_000_000 + b'\n{"event": "step"}\n'
    )
    for name in ("proof.json", "check.json", "rows.json", "ledger.json", "samples.json", "other.json"):
        (bad / name).write_text("[" * 100_000)
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "config.yaml").symlink_to("/dev/zero")
    studio = Studio(tmp_path)
    assert studio.ask("/").status_code == 200
    page = studio.ask(f"/runs/{studio.ids()['bad']}")
    assert page.status_code == 200
    assert "unreadable" in page.text


def test_a_disk_that_fails_is_told_and_is_no_internal_error(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scan() -> None:
        raise OSError(28, "No space left on device", "<b>folder")

    monkeypatch.setattr(studio.app.state.folder, "scan", scan)
    reply = studio.ask("/")
    assert reply.status_code == 400
    assert "No space left on device" in reply.text
    assert "&lt;b&gt;folder" in reply.text


def test_nothing_but_loopback_is_listened_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def create_server(address: tuple[str, int], **options: object) -> socket.socket:
        asked.append(address[:2])
        raise OSError(98, "in use")

    monkeypatch.setattr(socket, "create_server", create_server)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:8765") as refused:
        run_studio(tmp_path, PORT, show=lambda url: None)
    assert "--port 0" in refused.value.problems[0].hint
    assert "--host" not in refused.value.problems[0].hint, "the studio has no such option"
    assert asked == [("127.0.0.1", PORT)]


def test_a_browser_with_a_window_is_opened_and_none_in_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit.cli.studio import _open

    def opened(browser: webbrowser.BaseBrowser) -> bool:
        called = threading.Event()
        monkeypatch.setattr(browser, "open", lambda url: called.set())
        monkeypatch.setattr(webbrowser, "get", lambda: browser)
        before = threading.enumerate()
        _open(URL)
        for thread in set(threading.enumerate()) - set(before):
            thread.join()
        return called.is_set()

    monkeypatch.delenv("BROWSER", raising=False)
    assert opened(webbrowser.BackgroundBrowser("x-www-browser"))
    assert not opened(webbrowser.GenericBrowser("w3m"))
    monkeypatch.setenv("BROWSER", "w3m")
    assert opened(webbrowser.GenericBrowser("w3m")), "somebody wants this one"
    monkeypatch.setattr(webbrowser, "get", lambda: (_ for _ in ()).throw(webbrowser.Error("none")))
    _open(URL)
