"""The CUDA path beside the CPU's, in numbers, on a simulated device. See test_devices.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  (it reads what torch.cuda says: before there is a simulated device)
import pytest
import torch
from tests.gpu.device import A100, H100, T4
from tests.gpu.networks import Gradients, difference, measure, network_on, numbers, small_packs
from tests.gpu.runs_here import FirstOfTwo, settings, short_proof, write_pairs
from tests.gpu.simulated import Simulated, chosen, memory, simulated_cuda, simulated_mps
from tests.gpu.streams import RaceError, Stream
from tests.runs import digest, events, interrupt_after, tiny_run, without_clock
from tests.tiny_models import FAMILIES, HYBRIDS
from torch import Tensor

from lorafit.check import probe
from lorafit.errors import RunError, TrainingError
from lorafit.evaluate import samples
from lorafit.infer.model import load
from lorafit.model import attention
from lorafit.model import compile as compiling
from lorafit.model.linear import summed
from lorafit.model.memory import is_out_of_memory
from lorafit.model.quant import QUANTIZERS
from lorafit.plan import planner
from lorafit.run_dir import RunDirectory
from lorafit.training import loop
from lorafit.training.run import resume_run
from lorafit.verify import proof
from lorafit.verify.reload import Probe, probe_logits


def assert_close(one: tuple[float, Gradients], other: tuple[float, Gradients], most: float) -> None:
    assert max(difference(one, other)) <= most


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_loss_and_every_gradient_are_the_cpus(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = measure(network_on("cpu", family, torch.float64))
    with simulated_cuda(T4):
        assert_close(measure(network_on("cuda", family, torch.float64)), exact, 1e-12)
        assert "math" not in chosen
    monkeypatch.setattr(attention, "has_flash", lambda q: q.is_cuda)
    with simulated_cuda(H100):
        assert_close(measure(network_on("cuda", family, torch.float64)), exact, 1e-12)
        assert set(chosen) <= {"flash"}  # scores with a cap have their own definition


@pytest.mark.parametrize(("dtype", "capability"), [(torch.float16, T4), (torch.bfloat16, H100)], ids=str)
def test_recomputing_layers_changes_nothing(dtype: torch.dtype, capability: tuple[int, int]) -> None:
    with simulated_cuda(capability):
        network = network_on("cuda", "llama", dtype, dropout=0.3)
        whole = measure(network)
        network.zero_grad()
        network.recompute = True
        assert_close(measure(network), whole, 1e-6)


@pytest.mark.parametrize(("quantize", "recompute"), [("none", False), ("int8", True), ("nf4", False)])
def test_layers_on_the_host_change_nothing(quantize: Any, recompute: bool) -> None:
    """To the bit, also in a second pass, whose first layers are still there."""
    with simulated_cuda(H100):
        resident, offloaded = (
            network_on("cuda", "llama", torch.bfloat16, quantize, 0.3, offload=offload, num_hidden_layers=4)
            for offload in (False, True)
        )
        resident.recompute = offloaded.recompute = recompute
        packs = small_packs()
        for pack in packs:
            assert_close(measure(offloaded, [pack]), measure(resident, [pack]), 0.0)


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_variants_that_read_the_base_read_it_from_the_host(variant: Any) -> None:
    """Of layers of several sizes: those of a hybrid network."""
    shape = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    with simulated_cuda(H100):
        whole, other = (
            measure(
                network_on("cuda", "lfm2", torch.bfloat16, offload=offload, variant=variant, **shape),
                small_packs()[1:],
            )
            for offload in (False, True)
        )
        assert_close(other, whole, 0.0)


@pytest.mark.parametrize("forgotten", ["wait_event", "wait_stream"])
def test_a_copy_without_order_is_an_error(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_cuda(H100):
        network = network_on("cuda", "llama", torch.bfloat16, offload=True, num_hidden_layers=3)
        monkeypatch.setattr(Stream, forgotten, lambda self, other: None)
        with pytest.raises(RaceError):
            measure(network)


def test_rocm_takes_what_both_kinds_of_chips_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's chips are `cuda` in torch too, without torch's flash operators and float32 outputs of 16-bit products."""
    exact = measure(network_on("cpu", "llama", torch.float64))
    with simulated_cuda(H100):
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert_close(measure(network_on("cuda", "llama", torch.float64)), exact, 1e-12)
        big = torch.ones(32, 4, dtype=torch.bfloat16).to("cuda")
        assert summed(big, big).dtype == torch.bfloat16
        assert_close(measure(network_on("cuda", "llama", torch.bfloat16)), exact, 5e-2)
        assert set(chosen) == {"efficient"}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window"])
def test_mps_computes_the_plain_definitions(family: str) -> None:
    exact = measure(network_on("cpu", family, torch.float64))
    with simulated_mps():
        network = network_on("mps", family, torch.float32)
        assert_close(measure(network), exact, 1e-4)
        network.recompute = True
        network.zero_grad()
        assert_close(measure(network), exact, 1e-4)
    assert "flash" not in chosen


def test_a_run_on_mps_learns_resumes_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With measurements, answers, the trial step, a proof, and recomputed layers."""
    steps = ("train.max_steps=3", "train.learning_rate=0.03", "train.save_every=10", "train.eval_every=3")
    more = ("model.device=mps", "run.samples_every=10", "train.recompute=layers")

    def ask(run: proof.RunDirectory, probe: Probe) -> tuple[Tensor, Tensor]:
        network = load(run.path, device="mps", offline=True).network
        tuned, base = (probe_logits(network, probe, base=base) for base in (False, True))
        return tuned, base

    with simulated_mps(), short_proof():
        monkeypatch.setattr(proof, "logits_from_subprocess", ask)
        given = settings(tmp_path, *steps, *more)
        whole = tiny_run(given, tmp_path / "whole")
        losses = [event["loss"] for event in events(whole, "step")]
        assert losses[-1] < 0.95 * losses[0]
        assert whole.proven
        with pytest.MonkeyPatch.context() as stop:
            interrupt_after(2, stop)
            stopped = tiny_run(given, tmp_path / "stopped")
        assert (stopped.step, stopped.finished) == (2, False)
        assert digest(resume_run(stopped.path, quiet=True)) == digest(whole)
        assert len(load(whole.path, device="mps").generate(["Say it", "What?"], max_tokens=3)) == 2
    assert "flash" not in chosen


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled kernels operations work on blocks of rows; a row does not depend on its block."""
    with simulated_cuda(H100):
        network = network_on("cuda", "llama", torch.bfloat16)
        whole = measure(network)
        monkeypatch.setattr(compiling, "BLOCK", 500)
        assert_close(measure(network), whole, 0.0)
        assert compiling.num_blocks(501) == 2


def test_sixteen_bits_are_the_cpus_within_rounding() -> None:
    exact = measure(network_on("cpu", "llama", torch.float64))
    with simulated_cuda(H100):
        for dtype, most in ((torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
            assert_close(measure(network_on("cuda", "llama", dtype)), exact, most)


def test_sums_over_tokens_do_not_overflow_float16() -> None:
    """As with the loss scale: 2,048 products of 40 x 40 are more than float16 holds; B's master is float32."""
    big = torch.full((2048, 4), 40.0, dtype=torch.float16)
    with simulated_cuda(T4):
        total = summed(big.to("cuda"), big.to("cuda"))
    assert total.dtype == torch.float32
    assert bool((numbers(total) == 2048 * 1600).all())


def test_gradients_of_shared_tokens_are_added_in_float32() -> None:
    """A token of 64 documents: in 16 bits every further addition of a small gradient would be lost."""
    documents = [3] * 64
    index = torch.cat([torch.tensor([0, 2 * number + 1, 2 * number + 2]) for number in range(64)])
    with simulated_cuda(H100):
        packed = attention.PackedDocuments(documents, "cuda", index)
        x = torch.ones(129, 2, 8, dtype=torch.bfloat16, device="cuda").requires_grad_()
        gradient = torch.full((192, 2, 8), 2.0**-7)
        gradient[0] = 4.0
        packed.apart(x).backward(gradient.to(torch.bfloat16).to("cuda"))
        assert isinstance(x.grad, Simulated)
        total = numbers(x.grad)
    assert bool((total[0] == torch.tensor(4 + 63 * 2.0**-7).bfloat16()).all())
    assert bool((total[1:] == 2.0**-7).all())


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_outlier_columns_keep_their_precision(quantize: str) -> None:
    """As real activations have them. On CUDA the columns are chosen without a wait."""
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64) / 8, torch.randn(45, 64)
    x[:, 7] *= 60
    with simulated_cuda(H100):
        linear = QUANTIZERS[quantize](weight.to(torch.bfloat16).to("cuda"))
        exact = x.to(torch.bfloat16).double() @ numbers(linear.dequantize()).double().t()
        for rows in (1, 16, 17, 45):
            product = numbers(linear.product(x[:rows].to(torch.bfloat16).to("cuda"))).double()
            error = float((product - exact[:rows]).norm() / exact[:rows].norm())
            assert error < (2e-2 if quantize == "int8" else 6e-2), rows
            gradient = torch.randn(rows, 48).to(torch.bfloat16)
            wanted = gradient.double() @ numbers(linear.dequantize()).double()
            into = numbers(linear.input_gradient(gradient.to("cuda"))).double()
            assert float((into - wanted).norm() / wanted.norm()) < 6e-2


@pytest.mark.parametrize(
    ("capability", "more"),
    [
        (A100, ()),
        pytest.param(T4, ("lora.dropout=0.1", "train.recompute=layers"), marks=pytest.mark.slow),
        pytest.param(H100, ("model.quantize=int8",), marks=pytest.mark.slow),
    ],
    ids=["a100", "t4", "h100"],
)
def test_a_run_learns_is_proven_and_resumes_to_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    more: tuple[str, ...],
) -> None:
    def ask(run: proof.RunDirectory, probe: Probe) -> tuple[Tensor, Tensor]:
        """As the fresh process does, in this one: another would have no device."""
        network = load(run.path, device="cuda", offline=True).network
        tuned, base = (probe_logits(network, probe, base=base) for base in (False, True))
        return tuned, base

    steps = ("train.max_steps=5", "train.learning_rate=0.02", "train.save_every=10", "train.eval_every=5")
    with simulated_cuda(capability), short_proof():
        monkeypatch.setattr(proof, "logits_from_subprocess", ask)
        given = settings(tmp_path, *steps, "run.samples_every=10", *more)
        whole = tiny_run(given, tmp_path / "whole")
        losses = [event["loss"] for event in events(whole, "step")]
        assert losses[-1] < 0.95 * losses[0]
        checks = json.loads((whole.path / "proof.json").read_text())["checks"]
        reload = next(check for check in checks if check["name"] == "reload")
        assert reload["verdict"] == "pass"
        assert "to the bit" in reload["text"]
        with pytest.MonkeyPatch.context() as stop:
            interrupt_after(2, stop)
            stopped = tiny_run(given, tmp_path / "stopped")
        assert (stopped.step, stopped.finished) == (2, False)
        assert digest(resume_run(stopped.path, quiet=True)) == digest(whole)


def test_a_run_with_layers_on_the_host_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the two take turns. The answers at the end come from such a model too."""
    quiet = (
        "run.samples=0",
        "run.verify=false",
        "run.check=none",
        "train.save_every=10",
        "train.max_steps=3",
    )
    with simulated_cuda(A100):
        given = settings(tmp_path, *quiet, num_hidden_layers=3)
        whole = tiny_run(given, tmp_path / "whole")
        interrupt_after(2, monkeypatch)
        stopped = tiny_run([*given, "model.offload=layers"], tmp_path / "stopped")
        monkeypatch.undo()
        assert stopped.step == 2
        offloaded = load(stopped.path, device="cuda")
        assert offloaded.network.streamed is not None
        answers = offloaded.generate(["Say it"], max_tokens=2)
        assert digest(resume_run(stopped.path, ["model.offload=none"], quiet=True)) == digest(whole)
        assert (
            load(whole.path, device="cuda", adapter=stopped.adapter).generate(["Say it"], max_tokens=2)
            == answers
        )


def changed_in(step: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply the loss of the rows of a step, whenever it is computed, and remember nothing else."""
    real, gradients, rows = loop.pack_losses, loop._gradients, set[bytes]()

    def watched(job: loop.TrainContext, state: Any, batch: Any) -> Any:
        if state.step + 1 == step:
            rows.update(pack.ids.tobytes() for pack in batch.packs)
        return gradients(job, state, batch)

    def pack_losses(network: Any, pack: Any, **more: Any) -> Any:
        loss, each = real(network, pack, **more)
        return (loss * factor if pack.ids.tobytes() in rows else loss), each

    monkeypatch.setattr(loop, "_gradients", watched)
    monkeypatch.setattr(loop, "pack_losses", pack_losses)


def test_numbers_that_are_read_late_give_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same metrics and bytes as with a read in each step; in the third step float16 overflows."""
    quiet = (
        "run.samples=0",
        "run.verify=false",
        "run.check=none",
        "train.save_every=4",
        "train.eval_every=5",
    )
    runs = []
    with simulated_cuda(T4):
        given = settings(tmp_path, *quiet, "train.max_steps=5", "lora.dropout=0.2", "model.dtype=float16")
        changed_in(3, 4e4, monkeypatch)
        for name in ("late", "immediate"):
            runs.append(tiny_run(given, tmp_path / name))
            monkeypatch.setattr(loop, "_may_be_late", lambda job: False)
    kinds = ("step", "heldout", "saved", "digest")
    late, immediate = (
        [
            {key: value for key, value in without_clock(event).items() if key != "path"}
            for kind in kinds
            for event in events(run, kind)
        ]
        for run in runs
    )
    assert late == immediate
    assert digest(runs[0]) == digest(runs[1])
    states = [json.loads((run.path / "checkpoints/step-000004/state.json").read_text()) for run in runs]
    assert states[0] == states[1]
    assert states[0]["scale"]["factor"] < 2**16


@pytest.mark.parametrize("method", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_preferences_of_several_ranks_that_are_read_late_give_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The second rank has no rows: its numbers are added as zeros."""
    quiet = ("run.samples=0", "run.verify=false", "run.check=none", "train.eval_every=3", "train.max_steps=3")
    steps, runs = loop._steps, []

    def with_ranks(job: loop.TrainContext, *rest: Any) -> Any:
        return steps(dataclasses.replace(job, ranks=FirstOfTwo()), *rest)

    with simulated_cuda(H100):
        pairs = f"data.path={write_pairs(tmp_path / 'pairs.json')}"
        given = settings(tmp_path, *quiet, "model.dtype=float32", f"train.method={method}", pairs)
        for name in ("late", "immediate"):
            with monkeypatch.context() as patch:
                if name == "late":
                    patch.setattr(loop, "_steps", with_ranks)
                else:
                    patch.setattr(loop, "_may_be_late", lambda job: False)
                runs.append(tiny_run(given, tmp_path / name))
    if method == "dpo":
        assert digest(runs[0]) == digest(runs[1])
    for kind, name in (
        ("step", "loss"),
        ("step", "grad_norm"),
        ("preferences", "margin"),
        ("preferences", "kl"),
    ):
        late, immediate = ([event[name] for event in events(run, kind)] for run in runs)
        assert late == pytest.approx(immediate, rel=1e-5, abs=1e-6)  # KTO's mean is added up on the device
    assert len(events(runs[0], "step")) == 3


def test_a_loss_that_is_not_finite_ends_the_run_with_what_was_saved_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = ("run.samples=0", "run.verify=false", "run.check=none", "train.save_every=2", "data.holdout=0")
    with simulated_cuda(H100):
        given = settings(tmp_path, *quiet, "train.max_steps=5")
        changed_in(4, float("nan"), monkeypatch)
        with pytest.raises(TrainingError, match="step 4: the loss is not finite.*no weight was changed"):
            tiny_run(given, tmp_path / "run")
        assert [event["step"] for event in events(tmp_path / "run", "step")] == [1, 2, 3]
        monkeypatch.undo()
        resumed = resume_run(tmp_path / "run", quiet=True)
        assert digest(resumed) == digest(tiny_run(given, tmp_path / "whole"))


def short_in(monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str], calls: range = range(1000)) -> None:
    """Let every allocation fail in the calls of a function whose number, from 0, is in `calls`."""
    real, numbers_of_calls = getattr(*where), iter(range(1000))

    def short(*args: Any, **kwargs: Any) -> Any:
        with memory.short() if next(numbers_of_calls) in calls else nullcontext():
            return real(*args, **kwargs)

    monkeypatch.setattr(*where, short)


@pytest.mark.parametrize("quick", [False, True])
def test_a_run_goes_on_without_memory_for_what_is_not_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    """Plan, trial step, answers, and two checks of the proof: of them here and in the fresh process."""
    for name, value in (("LEAST_SECONDS", 0.0), ("LEAST_STEPS", 1), ("MOST_SHARE", 100.0)):
        monkeypatch.setattr(planner, name, value)  # the plan measures, however short the run is
    with simulated_cuda(T4), short_proof():
        given = settings(tmp_path, "train.max_steps=2", "model.dtype=float16")
        short_in(monkeypatch, (planner, "quick_rates" if quick else "calibrate"))
        short_in(monkeypatch, (probe, "probe"))
        short_in(monkeypatch, (samples.SampleGenerator, "_answer"))
        short_in(monkeypatch, (proof, "stop"))
        if quick:
            short_in(monkeypatch, (proof, "probe_logits"))
        else:  # the fresh process
            monkeypatch.setattr(proof, "logits_from_subprocess", raising(MemoryError("out of memory")))
        result = tiny_run(given, tmp_path / "run")
    assert result.finished
    assert result.proven
    texts = [event["text"] for event in events(result, "note")]
    for text in (
        "no memory for the pass that the plan measures: its times are left out",
        "memory: not enough for the trial step, which is left out",
        "no memory to answer prompts: not tried again",
    ):
        assert texts.count(text) == 1, texts
    checks = json.loads((result.path / "proof.json").read_text())["checks"]
    verdicts = {check["name"]: check["verdict"] for check in checks}
    assert (verdicts["stop"], verdicts["reload"], verdicts["changed"]) == ("skip", "skip", "pass")


def raising(error: Exception) -> Callable[..., Any]:
    def function(*args: object, **kwargs: object) -> Any:
        raise error

    return function


def test_a_step_without_memory_is_repeated_with_smaller_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_training = ("run.samples=0", "run.verify=false", "data.holdout=0", "run.check=none")
    with simulated_cuda(T4):
        given = settings(tmp_path, *only_training, "run.too_large=auto", "train.micro_batch_tokens=4096")
        short_in(monkeypatch, (loop, "pack_losses"), range(1, 2))
        result = tiny_run(given, tmp_path / "run")
        monkeypatch.undo()
        with_memory = tiny_run(given, tmp_path / "with-memory")
    assert any("repeated with passes" in event["text"] for event in events(result, "note"))
    losses = [[event["loss"] for event in events(run, "step")] for run in (result, with_memory)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("where", "calls"),
    [((loop, "pack_losses"), range(1, 1000)), ((loop, "heldout_loss"), range(2, 1000))],
    ids=["step", "held-out"],
)
def test_a_run_without_memory_for_training_ends_with_one_line_and_a_saved_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str], calls: range
) -> None:
    quiet = ("run.samples=0", "run.verify=false", "run.check=none", "train.eval_every=1")
    with simulated_cuda(T4):
        given = settings(tmp_path, *quiet, "train.micro_batch_tokens=4096", "train.save_every=100")
        short_in(monkeypatch, where, calls)
        with pytest.raises(RunError, match="out of memory") as caught:
            tiny_run(given, tmp_path / "run")
        assert len(caught.value.problems) == 1
        assert RunDirectory(tmp_path / "run").saved_steps()
        monkeypatch.undo()
        assert resume_run(tmp_path / "run", quiet=True).finished


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_what_runs_out_of_memory_beside_tensors_counts_too(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
