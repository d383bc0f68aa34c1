"""Runs over each other, talk by way of `lorafit serve`, and what one takes away."""

from __future__ import annotations

import asyncio
import json
import re
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import httpx
import pytest
from tests.report.runs import HOSTILE, write_run
from tests.report.test_report import Structure
from tests.studio.pages import Studio

from lorafit.cli.export import export
from lorafit.studio import take_away, talk
from lorafit.studio.setting_charts import Trial, setting_charts


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = tmp_path_factory.mktemp("studio")
    write_run(folder / "plain", 40)
    other = write_run(folder / "sweep" / "trial-001", 30)
    text = (other / "config.yaml").read_text().replace("rank: 16", "rank: 4")
    (other / "config.yaml").write_text(text)
    write_run(folder / "sweep" / "trial-002", 30)
    (folder / "sweep" / "sweep.json").write_text("[]")
    for name in ("one", "two"):
        write_run(folder / "hostile" / name, 40, lambda text: text + "".join(HOSTILE))
    return Studio(folder)


def test_chosen_runs_are_over_each_other_with_what_differs(studio: Studio) -> None:
    ids = studio.ids()
    page = studio.ask("/compare", params={"run": [ids["plain"], ids["sweep/trial-001"]]}).text
    assert page.count('class="line c0"') == page.count('class="line c1"') == 4
    assert '<th scope="row">lora.rank</th><td>16</td><td>4</td>' in page
    assert "data.path" not in page.partition('id="keys"')[2].partition("</section>")[0]
    assert "1.900" in page
    empty = studio.ask("/compare").text
    assert f'value="{ids["plain"]}"' in empty


def test_three_runs_are_a_picture_of_what_differs(studio: Studio) -> None:
    ids = studio.ids()
    three = [ids["plain"], ids["sweep/trial-001"], ids["sweep/trial-002"]]
    page = studio.ask("/compare", params={"run": three}).text
    picture = page.partition('id="settings"')[2].partition("</section>")[0]
    assert picture.count("<figure") == 1
    assert re.findall(r'<text class="x" [^>]*>([^<]*)<', picture) == ["4", "16"]
    assert picture.count('<path class="dots c') == 3
    two = studio.ask("/compare", params={"run": three[:2]}).text
    assert 'id="settings"' not in two


def test_values_stand_in_order_and_the_line_joins_the_lowest() -> None:
    values = ["1e-3", "2e-4", "16", "auto", "2e-4"]
    losses = [3.0, 2.0, 1.0, 4.0, 9.0]
    trials = [
        Trial(str(index), "c0", loss, {"k": value, "same": f"x{value}"})
        for index, (value, loss) in enumerate(zip(values, losses, strict=True))
    ]
    (chart,) = setting_charts(trials, ["k", "none", "same"])
    assert [text for _, text in chart.x_labels] == ["2e-4", "1e-3", "16", "auto"]
    heights = [float(point.split()[1]) for point in chart.paths[0][1][1:].split("L")]
    assert sorted(heights, reverse=True) == [heights[index] for index in (2, 0, 1, 3)]
    assert len(chart.paths) == 6


def test_an_export_says_whether_it_was_verified(studio: Studio) -> None:
    exports = studio.folder / "plain" / "exports"
    for name, parity in (
        ("good", '{"verified": true}'),
        ("bad", '{"verified": 1, "why": "<b>no"}'),
        ("none", "["),
    ):
        (exports / name).mkdir(parents=True)
        (exports / name / "parity.json").write_text(parity)
    (exports / "good" / "README.md").write_text("# A card <script>")
    page = studio.ask(f"/runs/{studio.ids()['plain']}/export").text.partition('id="kinds"')[0]
    assert page.count(">verified<") == page.count(">not verified<") == 1
    assert "&lt;b&gt;no" in page
    assert "# A card &lt;script&gt;" in page
    assert "good verified, none" in " ".join(studio.ask(f"/compare?run={studio.ids()['plain']}").text.split())


def test_a_sweep_is_compared_by_its_name(studio: Studio) -> None:
    (sweep,) = {line for line in studio.ask("/compare").text.split('"') if line.startswith("/compare?sweep=")}
    page = studio.ask(sweep).text
    assert "sweep/trial-001" in page
    assert 'class="line c1"' in page
    assert 'class="line c2"' not in page
    assert studio.ask("/compare?sweep=../x").status_code == 200
    assert studio.ask("/compare?run=nothing").status_code == 400


def test_hostile_runs_are_text_in_a_comparison(studio: Studio) -> None:
    ids = studio.ids()
    one, two = ids["hostile/one"], ids["hostile/two"]
    found = [tag for tag, names in Structure.of(studio.ask("/compare", params={"run": [one, two]}).text).tags]
    assert not {"img", "iframe"} & set(found)
    assert found.count("script") == 2


def test_each_export_is_its_command(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = get_args(get_args(get_type_hints(export, include_extras=True)["kind"])[0])
    assert kinds == take_away.KINDS
    started: list[list[str]] = []
    monkeypatch.setattr(studio.app.state.jobs, "_spawn", lambda job: started.append(list(job.words)) or job)
    address = f"/runs/{studio.ids()['plain']}/export"
    page = studio.ask(address).text
    for kind in kinds:
        assert f"lorafit export {studio.app.state.folder.path / 'plain'} {kind}</pre>" in page
    assert studio.send(address, kind="merged").status_code == 303
    assert started == [["export", str(studio.folder / "plain"), "merged"]]
    assert studio.send(address, kind="adapter --push evil/x").status_code == 400


class Process:
    """A `lorafit serve` that has printed its address."""

    def __init__(self, lines: list[bytes]) -> None:
        self.returncode: int | None = None
        self.pid = 2**22 + 1  # of no process
        self.lines = [*lines, b""]
        self.stdout = SimpleNamespace(readline=self.readline)

    async def readline(self) -> bytes:
        return self.lines.pop(0)

    async def wait(self) -> int:
        return 0

    def terminate(self) -> None:
        self.returncode = 0


class Client(httpx.AsyncClient):
    asked: list[tuple[str, Any]] = []  # noqa: RUF012

    def __init__(self, server: talk.Server) -> None:
        def reply(request: httpx.Request) -> httpx.Response:
            Client.asked.append((request.headers["authorization"], json.loads(request.content or b"null")))
            if request.url.path.endswith("/models"):
                return httpx.Response(200, json={"data": [{"id": "plain"}, {"id": "base"}]})
            return httpx.Response(200, content=b'data: {"choices": [{"delta": {"content": "hi"}}]}\n\n')

        super().__init__(
            transport=httpx.MockTransport(reply),
            base_url=server.url,
            headers={"Authorization": f"Bearer {server.token}"},
        )


def test_the_talk_goes_through_a_server_whose_token_stays_here(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talk, "_client", Client)
    process = Process([b"models   plain\n", b"http://127.0.0.1:8123/v1\n"])
    commands: list[tuple[Any, ...]] = []

    async def spawn(*words: Any, **options: Any) -> Process:
        commands.append((*words, options["env"][talk.TOKEN_VARIABLE]))
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", spawn)
    name = studio.ids()["plain"]
    assert studio.send("/talk/open", run=name).status_code == 303
    server = studio.app.state.talk
    asyncio.run(talk._read(server)) if server.state == "loading" else None
    assert commands[0][1:4] == ("-m", "lorafit", "serve")
    assert (server.state, server.models, server.url) == (
        "ready",
        ["plain", "base"],
        "http://127.0.0.1:8123/v1",
    )
    page = studio.ask("/talk").text
    assert server.token not in page
    asked = {
        "model": "plain",
        "messages": [{"role": "user", "content": "?"}],
        "temperature": 0,
        "tools": ["x"],
    }
    reply = studio.ask("/talk/answer", "POST", json=asked)
    assert reply.text.startswith('data: {"choices"')
    sent = {key: value for key, value in asked.items() if key != "tools"}
    assert Client.asked[-1] == (f"Bearer {server.token}", {**sent, "stream": True})
    for content in (b"{", b"[]", b"\xff"):
        assert studio.ask("/talk/answer", "POST", content=content).status_code == 400
    assert studio.send("/talk/close").status_code == 303
    assert process.returncode == 0
    assert studio.ask("/talk/answer", "POST", json=asked).status_code == 409


def test_a_question_goes_into_the_tasks_file(studio: Studio) -> None:
    from lorafit.evaluate.tasks import read_tasks

    path = studio.folder / talk.TASKS
    for answer in ("five", "한국어 <b>"):
        assert studio.send("/talk/task", prompt="2 + 3?", answer=answer).json() == {"path": str(path)}
    assert studio.send("/talk/task", prompt="x", answer=" ").status_code == 400
    tasks = read_tasks(path)
    assert [task.answers for task in tasks] == [("five",), ("한국어 <b>",)]
    path.unlink()
    (studio.folder / "precious.txt").write_text("keep")
    path.symlink_to(studio.folder / "precious.txt")
    assert studio.send("/talk/task", prompt="x", answer="y").status_code == 400
    assert (studio.folder / "precious.txt").read_text() == "keep"
