"""The arithmetic of benchmarks/speed.py: FLOPs, reading what programs print, order, verdicts; never speed itself."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from benchmarks.marks import put_between
from benchmarks.profile import group_of
from benchmarks.programs import PROGRAMS, Outcome, Program, Step, command, parse_steps, watch
from benchmarks.targets import TARGETS, Results, Target, linear_parameters, model_flops
from tests.tiny_models import config_of

from benchmarks import profile, programs, report, rows, speed, targets
from lorafit.config.load import load_config, recipe_file
from lorafit.config.schema import keys
from lorafit.model.architecture import parse_architecture

BENCHMARKS = Path(speed.__file__).parent
TINYLLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def results(*outcomes: Outcome, config: dict[str, Any] | None = None, rate: float = 400.0) -> Results:
    limit = {"bfloat16": {"forward": rate, "input_gradient": rate, "both": rate}}
    return Results(config or TINYLLAMA, outcomes, [limit])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_frozen_parameters_are_all_but_norms_and_tables(family: str) -> None:
    raw = config_of(family)
    arch = parse_architecture(raw, "test")
    norms = arch.hidden_size * (2 * arch.num_hidden_layers + 1)
    tables = 2 * arch.vocab_size * arch.hidden_size
    assert linear_parameters(raw) == arch.num_parameters - norms - tables


def test_flops_of_tinyllama() -> None:
    """By hand: 2 * 2048^2 + 2 * 2048 * 256 + 3 * 2048 * 5632 in a layer; about 4.1 GFLOP with the head."""
    layer = 2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 5632
    assert linear_parameters(TINYLLAMA) == 22 * layer
    assert model_flops(TINYLLAMA, 10, 3) == 4 * (10 * 22 * layer + 3 * 32000 * 2048)
    assert model_flops(TINYLLAMA, 1, 1) == pytest.approx(4.14e9, rel=0.01)


def test_reads_what_each_program_prints() -> None:
    lorafit = """
{"event": "run_started", "num_steps": 2}
{"event": "step", "step": 1, "loss": 1.5, "supervised_tokens": 7, "tokens": 9, "rows": 4, "seconds": 2.5}
{"event": "heldout", "step": 1, "loss": 1.0}
{"event": "run_ended", "step": 1, "seconds": 9.0}
{"event": "step", "st"""
    assert parse_steps(lorafit, None) == [Step(2.5, 4, 9, 7)]
    step = '{"step": 1, "loss": 1.5, "seconds": 99.5, "real_tokens": 826, "rows": 4}'
    seed = f'a warning\n{step}\n{{"peak_rss_gb": 15.7}}\n'
    assert parse_steps(seed, None) == [Step(99.5, 4, 826, None)]
    assert parse_steps('{"step": 1, "seconds": 70.0}\n[1]\n{}', 2048) == [Step(70.0, None, 2048, None)]


def test_figures_leave_the_warm_up_out_and_take_medians() -> None:
    steps = [Step(90.0, 4, 800, 400), Step(2.0, 4, 800, 400), Step(4.0, 4, 800, 400)]
    found = results(
        Outcome("a", 0, steps, first_step_seconds=10.0, peak_bytes=4_000_000_000),
        Outcome(
            "a", 1, [Step(50.0), Step(1.0, 4, 800, 400)], first_step_seconds=20.0, peak_bytes=5_000_000_000
        ),
    )
    assert found.seconds("a") == 2.0
    assert found.rows_per_second("a") == 2.0
    assert found.tokens_per_second("a") == 400.0
    assert found.warm_up_seconds("a") == 70.0
    assert found.first_step_seconds("a") == 15.0
    assert found.peak_gb("a") == 5.0
    assert found.share_of_product("a") == pytest.approx(model_flops(TINYLLAMA, 800, 400) / 2.0 / 400e9)
    assert found.rows_per_second("b") is None
    assert found.peak_gb("b") is None


@pytest.mark.parametrize(
    ("value", "at_most", "layers", "verdict"),
    [
        (10.0, False, None, "pass"),
        (9.99, False, 22, "miss"),
        (10.0, True, None, "pass"),
        (10.1, True, None, "miss"),
        (20.0, False, 4, "needs 4 layers"),
        (None, False, None, "not measured"),
    ],
)
def test_verdicts(value: float | None, at_most: bool, layers: int | None, verdict: str) -> None:
    target = Target("a rate", 10, "x", lambda _: value, at_most, layers)
    assert target.row(results())[1:2] + target.row(results())[3:] == [
        "<= 10x" if at_most else ">= 10x",
        verdict,
    ]


def test_every_target_is_measured_by_programs_that_exist() -> None:
    step = Step(2.0, 4, 800, 400)
    found = results(
        *(
            Outcome(program.name, 0, [step, step], first_step_seconds=9.0, peak_bytes=10**9)
            for program in PROGRAMS
        )
    )
    assert {target.verdict(found) for target in TARGETS} <= {"pass", "miss"}
    assert all(target.verdict(results()) == "not measured" for target in TARGETS)


def test_every_setting_is_one_that_lorafit_takes() -> None:
    for program in PROGRAMS:
        assert sum(program.measured) >= 5
        if program.kind == "lorafit":
            words = command(program, "model", "rows.json", "baselines", "run", 6)
            overrides = [word for word in words if "=" in word]
            known = [word for word in overrides if word.split("=")[0] in set(keys())]
            assert load_config(recipe_file("classic"), ["model.name=model", *known]).train.max_steps == 6
            assert {word.split("=")[0] for word in overrides if word not in known} <= {"model.quantize"}


def test_turns_alternate_and_every_part_has_its_own_steps() -> None:
    first, second = Program("a", "lorafit", (), (3, 2)), Program("b", "trl_sft", (), (5,))
    third = Program("c", "lorafit", (), (1, 1))
    turns = [(program.name, part, steps) for program, part, steps in speed.schedule([first, second, third])]
    assert turns == [("a", 0, 3), ("b", 0, 5), ("c", 0, 1), ("c", 1, 1), ("a", 1, 2)]
    assert speed.schedule([]) == []


def test_rows_come_in_full_packs_and_none_is_lost() -> None:
    lengths = [30 + (7 * index) % 50 for index in range(400)]
    order = rows.in_full_packs(lengths, 5, 10, 560)
    assert sorted(order) == list(range(400))
    for start in range(0, 50, 10):
        assert 0.98 * 560 <= sum(lengths[index] for index in order[start : start + 10]) <= 560
    with pytest.raises(SystemExit, match="no 10 rows"):
        rows.in_full_packs([1] * 100, 1, 10, 560)


def test_a_process_is_watched_to_its_end_or_killed_after_its_steps(tmp_path: Path) -> None:
    script = """
import json, sys, time
print(json.dumps({"event": "run_started"}), flush=True)
for step in range(1, int(sys.argv[1]) + 1):
    print(json.dumps({"step": step, "seconds": 0.01}), flush=True)
while int(sys.argv[1]) > 3:
    time.sleep(60)
sys.exit(3)
"""
    said = tmp_path / "said.out"
    ended = watch([sys.executable, "-c", script, "2"], tmp_path, said, said, None)
    assert ended.exit_code == 3
    assert 0 < ended.seen["run_started"] <= ended.seen["step"] <= ended.wall_seconds
    own_peak = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )  # a new process starts with it on Linux
    assert 2_000_000 < ended.peak_bytes < max(2_000_000_000, 2 * own_peak)
    ended = watch([sys.executable, "-c", script, "5"], tmp_path, said, said, 4)
    assert ended.exit_code == -9


def test_the_report_comes_from_the_record_alone() -> None:
    outcome = Outcome("classic, bfloat16", 0, [Step(9.0, 4, 800, 800), Step(8.0, 4, 800, 800)], 4.0, 13.0)
    record = {
        "date": "2030-01-01",
        "command": "python -m benchmarks.speed",
        "machine": {"cpu": "a processor", "threads": 2, "memory_gb": 24},
        "versions": {"torch": "2.13.0"},
        "model": {"config": TINYLLAMA},
        "limits": [{"bfloat16": {"forward": 400.0, "input_gradient": 420.0, "both": 410.0}}],
        "outcomes": [asdict(outcome)],
    }
    text = report.report(json.loads(json.dumps(record)))
    assert "| classic, bfloat16 |     1 |       8.00 |       9.00 |  0.500 |    100.0 |" in text
    assert "2030-01-01, a processor, 2 threads, 24 GB; 22 layers; torch 2.13.0." in text


def test_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: begin -->\nold\n<!-- a: end -->\n<!-- b: begin -->\n<!-- b: end -->\n")
    put_between(page, "a", "new\n")
    assert page.read_text() == (
        "before\n<!-- a: begin -->\n\nnew\n\n<!-- a: end -->\n<!-- b: begin -->\n<!-- b: end -->\n"
    )
    with pytest.raises(SystemExit, match="page.md has no `<!-- c: begin -->`"):
        put_between(page, "c", "new")
    with pytest.raises(SystemExit, match="missing.md has no"):
        put_between(tmp_path / "missing.md", "a", "new")


def test_a_record_names_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--work", "/home/somebody/work", "--json", "out/speed.json", "--layers", "4"]
    assert list(speed._without_paths(words)) == ["--work", "work", "--json", "speed.json", "--layers", "4"]
    monkeypatch.setenv("LORAFIT_SHARED", "/nowhere")
    with pytest.raises(SystemExit, match="LORAFIT_SHARED"):
        speed.shared_folder()


@pytest.mark.parametrize(
    ("name", "enclosing", "group"),
    [
        ("aten::mm", [], "matrix products"),
        ("aten::_int_mm", ["QuantizedLinear"], "matrix products"),
        ("aten::mm", ["_ChunkedCrossEntropy"], "matrix products"),
        ("aten::exp_", ["_ChunkedCrossEntropy"], "loss without its products"),
        ("aten::exp_", [], "elementwise"),
        ("aten::bmm", ["PackedAttention"], "attention"),
        (
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            ["aten::scaled_dot_product_attention"],
            "attention",
        ),
        ("graph_0_cpp_fused_mul_silu_1", ["Torch-Compiled Region: 0/0"], "compiled kernels"),
        ("aten::copy_", ["aten::to"], "copies and casts"),
        ("aten::zero_", [], "zero-fill"),
        ("aten::_foreach_mul_", ["lorafit clip"], "optimizer"),
        ("aten::cat", ["lorafit data"], "data"),
        ("aten::sort", [], "other operators"),
    ],
)
def test_operators_fall_into_groups(name: str, enclosing: list[str], group: str) -> None:
    assert group_of(name, enclosing) == group


def test_the_profile_runs_and_its_groups_add_up() -> None:
    root = BENCHMARKS.parent
    config = load_config(
        None, [f"model.name={root}/demo/model", f"data.path={root}/demo/rows.json", "model.dtype=float32"]
    )
    found = profile.profile(config, root / "demo/model", 1)
    spent = found["milliseconds"]
    assert found["tokens"] > 0
    assert spent["matrix products"] > 0
    assert spent["attention"] > 0
    assert sum(spent.values()) == pytest.approx(found["total_milliseconds"], rel=0.05)
    assert len(profile.table(found).splitlines()) == len(profile.GROUPS) + 2


def test_the_harness_is_small_and_hides_no_standard_module() -> None:
    """No torch in the process that starts others; `profile` stays the standard library's beside our profile.py."""
    source = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import cProfile
assert cProfile.Profile and sys.modules["profile"].Profile
sys.path[0] = {str(BENCHMARKS.parent)!r}
import benchmarks.speed
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_file_says_its_purpose_and_is_short() -> None:
    for file in [programs, report, rows, speed, targets]:
        text = Path(file.__file__).read_text(encoding="utf-8")
        assert text.startswith('"""')
        assert len(text.splitlines()) < 400
