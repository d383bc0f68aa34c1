"""The command line as people meet it: what it prints where, its exit codes, and what it says to mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.command import COMMAND, TINY, Cli, Done
from tests.forked import Forked, run
from tests.tiny_models import write_model, write_rows
from tests.waiting import HANGS, until

import lorafit
from lorafit.config.schema import keys
from lorafit.observe.metrics_file import read_metrics
from lorafit.storage.atomic import verify_folder


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "model")
    write_rows(folder / "rows.json")
    return folder


def start(material: Path, output: Path, *overrides: str) -> list[str]:
    model, data = str(material / "model"), str(material / "rows.json")
    return ["train", "--model", model, "--data", data, "--output", str(output), *TINY, *overrides]


@pytest.fixture(scope="module")
def trained(material: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run made by the real command in a process, and what the process said."""
    output = material / "runs" / "first"
    words = start(material, output, "train.max_steps=6", "train.log_every=2", "train.learning_rate=0.01")
    return output, run("lorafit", *words)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_loads_few_modules(words: list[str]) -> None:
    """The promise is 0.3 s on a quiet machine. It stands or falls with what is imported: 500 modules take that long."""
    source = (
        "import sys; from lorafit.cli.main import main\n"
        f"sys.argv = ['lorafit', *{words!r}]\n"
        "try:\n main()\nfinally:\n print(len(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Usage:" in done.stdout
    assert int(done.stderr) < 500


def test_help_names_every_verb_and_flag(cli: Cli) -> None:
    done = cli("--help")
    assert done.code == 0
    for verb in ("train", "check", "show", "plan", "generate", "runs", "config"):
        assert re.search(rf"\b{verb}\b", done.out)
        assert cli(verb, "-h").code == 0
    for flag in ("--model", "--data", "--output", "--recipe", "--auto", "--resume"):
        assert flag in cli("train", "--help").out
    for flag in ("--model", "--data", "--output", "--recipe", "--auto", "--json"):
        assert flag in cli("plan", "--help").out


def test_version(cli: Cli) -> None:
    assert cli("--version") == Done(0, f"lorafit {lorafit.__version__}\n", "")


def test_train_says_plain_lines_and_gives_the_adapter(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    output, done = trained
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output / 'adapter'}\n"
    assert verify_folder(output / "adapter") == []
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    steps = [line for line in lines if re.match(r"step \d+/6  loss \d+\.\d{3}  lr ", line)]
    assert [line.split()[1] for line in steps] == ["2/6", "4/6", "6/6"]
    assert any("held-out loss" in line for line in lines)
    assert any(line.startswith("finished after 6 steps") for line in lines)
    environment = json.loads((output / "env.json").read_text())
    assert "train --model" in environment["command"]


def rows_file(folder: Path, text: str) -> Path:
    path = folder / "wrong.json"
    path.write_text(text)
    return path


WRONG_ROWS = [
    {"instruction": "Fine.", "input": "", "output": "Yes."},
    {"instruction": ["Hm."], "input": "", "output": "Yes."},
    {"instruction": "Hm.", "input": "", "output": None},
    {"instruction": "Fine.", "output": "Yes."},
    {"instruction": "No output."},
]
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "nothing given": (
        ["train"],
        ["`model.name` is missing", "--model NAME", "`data.path` is missing", "--data FILE"],
    ),
    "no such model": (
        ["train", "--model", "{tmp}/nope", "--data", "{rows}"],
        ["there is no folder `{tmp}/nope`"],
    ),
    "no such data": (["train", "--model", "{model}", "--data", "{tmp}/nope.json"], ["nope.json"]),
    "unknown key": (["{ok}", "lora.rnak=8"], ["unknown key `lora.rnak`", "did you mean `lora.rank`?"]),
    "wrong value": (
        ["{ok}", "lora.rank=many"],
        ["`lora.rank`: input should be a valid integer", "lorafit config"],
    ),
    "two mistakes": (
        ["{ok}", "lora.rnak=8", "train.epochs=0"],
        ["unknown key `lora.rnak`", "`train.epochs`"],
    ),
    "unknown recipe": (["train", "clasic"], ["there is no recipe `clasic`", "did you mean `classic`?"]),
    "two recipes": (["train", "classic", "--recipe", "default"], ["one recipe per run, not 2"]),
    "unknown template": (["{ok}", "data.template=fancy"], ["unknown template 'fancy'", "classic"]),
    "wrong rows": (
        ["train", "--model", "{model}", "--data", "{wrong}"],
        ["wrong.json row 2", "wrong.json row 3", "wrong.json row 5", "instruction", "output"],
    ),
    "no weights": (
        ["train", "--model", "{empty}", "--data", "{rows}"],
        ["model.safetensors is missing", "{empty}"],
    ),
    "output holds a run": (
        ["{ok}", "run.output={run}"],
        ["already holds a run", "lorafit train --resume {run}"],
    ),
    "no run to resume": (["train", "--resume", "{tmp}"], ["is not a run directory", "lorafit runs"]),
    "resume and settings": (
        ["train", "--resume", "{run}", "lora.rank=2"],
        ["is complete: no setting changes it any more", "lora.init_from="],
    ),
    "resume and a flag": (
        ["train", "--resume", "{run}", "--model", "{model}"],
        ["--resume accepts only settings"],
    ),
    "no such target": (["{ok}", "lora.targets=[q_porj]", "run.output={tmp}/new"], ["q_porj"]),
    "no such device": (["{ok}", "model.device=cuda:99", "run.output={tmp}/new"], ["cuda:99"]),
    "unknown device": (["{ok}", "model.device=tpu"], ["`model.device`"]),
    "unknown config key": (
        ["config", "lora.rnak"],
        ["there is no key `lora.rnak`", "did you mean `lora.rank`?"],
    ),
    "no such folder of runs": (["runs", "{tmp}/nope"], ["there is no folder"]),
    "no adapter to leave out": (
        ["generate", "{model}", "Hi", "--base", "--device", "cpu"],
        ["has no adapter"],
    ),
    "nothing to answer with": (["generate", "{tmp}/nope", "Hi"], ["there is no folder"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_exits_2_with_what_where_and_what_to_do(
    name: str, cli: Cli, material: Path, trained: tuple[Path, object], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    names = {
        "tmp": tmp_path,
        "model": material / "model",
        "rows": material / "rows.json",
        "wrong": rows_file(tmp_path, json.dumps(WRONG_ROWS)),
        "empty": tmp_path / "empty",
        "run": trained[0],
    }
    words, expected = MISTAKES[name]
    good = start(material, tmp_path / "new")
    if words[0] == "{ok}":
        good = good[: good.index("--output")] if any("run.output" in word for word in words) else good
        words = [*good, *words[1:]]
    done = cli(*(word.format(**names) for word in words))
    assert done.code == 2, done.err
    assert done.out == ""
    assert re.search(r"^error: ", done.err, re.MULTILINE)
    assert "Traceback" not in done.err
    assert "bug in lorafit" not in done.err
    for part in expected:
        assert part.format(**names) in done.err, done.err
    assert " hint: " in done.err, done.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["train", "--modle", "x"], "there is no option `--modle`", "did you mean `--model`?"),
        (["rows", "x", "--srt", "loss"], "there is no option `--srt`", "did you mean `--sort`?"),
        (["chat", "--zzz"], "there is no option `--zzz`", "see `lorafit chat --help`"),
        (["train", "--lr", "3"], "there is no option `--lr`", "in lorafit: train.learning_rate"),
        (["trian"], "there is no command `trian`", "did you mean `lorafit train`?"),
        (["zzz"], "there is no command `zzz`", "see `lorafit --help`"),
        (["export"], "`RUN` is missing", "see `lorafit export --help`"),
        (["rows", "x", "y"], "unexpected `y`", "see `lorafit rows --help`"),
        (
            ["rows", "x", "--top", "y"],
            "`--top`: ",
            "see `lorafit rows --help`",
        ),
        (
            ["rows", "x", "--sort", "y"],
            "`--sort`: 'y' is ",
            "see `lorafit rows --help`",
        ),
        (["rows", "x", "--top"], "option '--top' ", "see `lorafit --help`"),
    ],
)
def test_a_slip_on_the_command_line_is_one_problem_with_a_hint(
    words: list[str], message: str, hint: str, cli: Cli
) -> None:
    done = cli(*words)
    assert (done.code, done.out) == (2, "")
    said, *rest = done.err.splitlines()
    assert said.startswith(f"error: {message}")  # typer's own words may follow
    assert rest == [f" hint: {hint}"]


@pytest.mark.parametrize("name", ["cuda:x", "xpu", "meta", "cuda:99"])
@pytest.mark.parametrize(
    "command", [["generate", "MODEL", "Hi"], ["chat", "MODEL"], ["serve", "MODEL", "--port", "0"], ["train"]]
)
def test_a_device_is_checked_in_the_same_way_by_all_commands(
    command: list[str], name: str, cli: Cli, material: Path, tmp_path: Path
) -> None:
    words = [word.replace("MODEL", str(material / "model")) for word in command]
    given = ["--device", name]
    if command == ["train"]:
        words, given = start(material, tmp_path / "run"), [f"model.device={name}"]
    done = cli(*words, *given, stdin="Hi")
    assert (done.code, done.out) == (2, ""), done
    assert done.err.count("error:") == 1
    wanted = "not available here" if name == "cuda:99" else "a device is auto, cpu, gpu, cuda, cuda:N or mps"
    assert f"`{name}`" in done.err or repr(name) in done.err
    assert wanted in done.err


def test_a_device_in_capital_letters_is_read(cli: Cli, material: Path) -> None:
    done = cli("generate", material / "model", "Hi", "--device", "CPU", "--max-tokens", "1")
    assert (done.code, done.err) == (0, "")


def test_our_own_mistake_exits_1_and_asks_for_a_report(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("lorafit.config.load.flag_overrides", broken)
    done = cli("train")
    assert done.code == 1
    assert done.err.startswith("error: ZeroDivisionError: oh\n hint: this is a bug in lorafit")
    monkeypatch.setenv("LORAFIT_DEBUG", "1")
    assert "Traceback" in cli("train").err


def test_plan_prints_a_table_or_json_and_makes_nothing(cli: Cli, material: Path, tmp_path: Path) -> None:
    words = ["plan", *start(material, tmp_path / "run", "train.max_steps=3")[1:]]
    done = cli(*words)
    assert done.code == 0, done.err
    named = ("parameters", "supervised tokens", "steps", "peak memory", "time")
    assert all(any(line.startswith(name) for line in done.out.splitlines()) for name in named)
    plan = json.loads(cli(*words, "--json").out)
    assert (plan["steps"], plan["fits"]) == (3, True)
    assert not (tmp_path / "run").exists()


def test_plan_says_what_would_fit_and_exits_2(
    cli: Cli, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.plan.machine.available_bytes", lambda device: 1000)
    for verb in ("plan", "train"):
        done = cli(verb, *start(material, tmp_path / "run")[1:])
        assert (done.code, done.out) == (2, "")
        assert re.search(
            r"^error: training needs about .* but only 0 MB are available", done.err, re.MULTILINE
        )
        assert " hint: use a smaller model" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on_and_resume_finishes(
    material: Path, tmp_path: Path, cli: Cli
) -> None:
    output = tmp_path / "run"
    words = start(material, output, "train.max_steps=150", "data.holdout=0", "train.save_every=1000")
    with Forked("lorafit", *words) as child:
        metrics = output / "metrics.jsonl"
        until(lambda: metrics.exists() and b'"event": "step"' in metrics.read_bytes(), child.poll)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate()
        assert child.returncode == 130, err
    assert out == f"{output}\n"
    assert "Ctrl-C: saving after this step" in err
    assert f"continue with: lorafit train --resume {output}" in err
    assert "Traceback" not in err
    (saved,) = (output / "checkpoints").iterdir()
    assert verify_folder(saved) == []
    done = cli("train", "--resume", output)
    assert done.code == 0, done.err
    assert done.out == f"{output / 'adapter'}\n"
    assert f"continuing from step {int(saved.name.removeprefix('step-'))}\n" in done.err
    steps = [event["step"] for event in read_metrics(output / "metrics.jsonl") if event["event"] == "step"]
    assert steps == list(range(1, 151))


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [("HUP",), ("INT", "HUP", "TERM", "USR1")], ids=" ".join)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(
    material: Path, tmp_path: Path, ignored: tuple[str, ...]
) -> None:
    """As below nohup, which ignores SIGHUP, and in the background of a script, where SIGINT is ignored."""
    output = tmp_path / "run"
    words = start(material, output, "train.max_steps=150", "data.holdout=0", "train.save_every=1000")
    shell = ["sh", "-c", f'trap "" {" ".join(ignored)}; exec "$@"', "sh"]
    with subprocess.Popen(
        [*shell, *COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            metrics = output / "metrics.jsonl"
            until(lambda: metrics.exists() and b'"event": "step"' in metrics.read_bytes(), child.poll)
            for name in ignored:
                os.kill(child.pid, getattr(signal, f"SIG{name}"))
            stops = "TERM" not in ignored
            if stops:  # what is not ignored stops the run as ever
                steps = metrics.read_bytes().count(b'"event": "step"')
                until(lambda: metrics.read_bytes().count(b'"event": "step"') > steps + 2, child.poll)
                os.kill(child.pid, signal.SIGTERM)
            _, err = child.communicate(timeout=HANGS)
        finally:
            child.kill()
    assert child.returncode == (130 if stops else 0), err
    assert [name for name in ("HUP", "INT", "TERM", "USR1") if f"SIG{name}" in err] == ["TERM"] * stops


def test_runs_are_listed(cli: Cli, trained: tuple[Path, object], tmp_path: Path) -> None:
    output = trained[0]
    done = cli("runs", output.parent)
    assert (done.code, done.err) == (0, "")
    header, *_, row = [line for line in done.out.splitlines() if line.strip()]
    assert header.split() == [
        "run",
        "model",
        "state",
        "step",
        "loss",
        "held-out",
        "base",
        "learned",
        "started",
    ]
    assert {str(output), "finished", "6/6"} <= set(row.split())
    (line,) = cli("runs", output.parent, "--json").out.splitlines()
    record = json.loads(line)
    assert (record["run"], record["state"], record["step"]) == (str(output), "finished", 6)
    assert record["heldout_loss"] < record["base_loss"]
    nothing = cli("runs", tmp_path)
    assert (nothing.code, nothing.out, nothing.err) == (0, "", f"no runs in {tmp_path}\n")


def test_generate_answers_with_the_adapter_or_without(cli: Cli, trained: tuple[Path, object]) -> None:
    words = ["generate", trained[0], "Say the number 3.", "--device", "cpu", "--max-tokens", "12"]
    tuned, again, base = cli(*words), cli(*words), cli(*words, "--base")
    assert (tuned.code, tuned.err) == (0, "")
    assert tuned == again
    assert tuned.out.strip()
    assert tuned.out.endswith("\n")
    assert base.out != tuned.out
    sampled = [cli(*words, "--temperature", "2", "--seed", seed).out for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_gives_json_a_line_and_reads_prompts_from_a_pipe(
    cli: Cli, trained: tuple[Path, object]
) -> None:
    words = ["generate", trained[0], "--device", "cpu", "--max-tokens", "5"]
    done = cli(*words, "--json", stdin="Say 1.\n\n라마?\n")
    assert (done.code, done.err) == (0, "")
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["prompt"] for record in records] == ["Say 1.", "라마?"]
    assert all(set(record) == {"prompt", "answer", "stopped"} for record in records)
    plain = cli(*words, "Say 1.", "라마?")
    assert re.findall(r"^> (.*)$", plain.out, re.MULTILINE)[:1] == ["Say 1."]
    empty = cli(*words, stdin="\n")
    assert (empty.code, empty.out) == (2, "")
    assert "there is no prompt" in empty.err


def test_generate_compares_base_and_tuned(cli: Cli, trained: tuple[Path, object]) -> None:
    words = ["generate", trained[0], "Say the number 3.", "--device", "cpu", "--max-tokens", "5", "--compare"]
    done = cli(*words)
    assert (done.code, done.err) == (0, "")
    assert "Say the number 3." in done.out
    assert "base" in done.out
    assert "tuned" in done.out


def test_generate_holds_the_base_in_the_bits_that_are_asked_for(
    cli: Cli, trained: tuple[Path, object]
) -> None:
    words = ["generate", trained[0], "Say 3.", "--device", "cpu", "--max-tokens", "5", "--quantize"]
    assert cli(*words, "none").code == 0
    assert cli(*words, "int8").code == 0
    wrong = cli(*words, "int7")
    assert (wrong.code, wrong.out) == (2, "")
    assert "none, int8, nf4, fp8" in " ".join(wrong.err.replace("│", " ").split())


def test_generate_with_an_adapter_on_its_base(cli: Cli, material: Path, trained: tuple[Path, object]) -> None:
    rest = ["Say 3.", "--device", "cpu", "--max-tokens", "5"]
    adapter = trained[0] / "adapter"
    on_base = cli("generate", material / "model", *rest, "--adapter", adapter)
    assert on_base.code == 0, on_base.err
    assert on_base.out == cli("generate", adapter, *rest).out


def test_config_lists_and_explains_every_key(cli: Cli) -> None:
    everything = cli("config")
    assert everything.code == 0
    names = [line.split()[0] for line in everything.out.splitlines() if re.match(r"\w+\.\w+ ", line)]
    assert names == list(keys())
    one = cli("config", "lora.rank")
    assert [name for name in keys() if re.search(rf"^{re.escape(name)} ", one.out, re.MULTILINE)] == [
        "lora.rank"
    ]
    assert " 16 " in one.out
    section = cli("config", "lora")
    assert "lora.alpha" in section.out
    assert [name for name in keys() if re.search(rf"^{re.escape(name)} ", section.out, re.MULTILINE)] == [
        name for name in keys() if name.startswith("lora.")
    ]


def test_config_prints_a_json_schema(cli: Cli) -> None:
    schema = json.loads(cli("config", "--schema").out)
    assert set(schema["properties"]) == {key.partition(".")[0] for key in keys()}
    assert schema["additionalProperties"] is False
    assert {"model", "data"} <= set(schema["required"])


def test_config_prints_the_reference(cli: Cli) -> None:
    text = cli("config", "--markdown").out
    assert text.startswith("# Configuration\n")
    assert all(f"| `{key}` |" in text for key in keys())
