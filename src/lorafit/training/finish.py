"""After the last step: export the adapter, generate samples, verify what is on disk, write the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from lorafit.config.schema import Config
from lorafit.data.build import TrainingData
from lorafit.data.formats import Row
from lorafit.errors import LorafitError, RunError
from lorafit.infer.model import Model
from lorafit.model.adapter_file import load_adapter
from lorafit.observe.events import Message, Observer, RunEnded
from lorafit.observe.metrics_file import read_whole_events
from lorafit.report.page import write_report
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import verify_folder
from lorafit.training.checkpoint import TrainState, export_adapter
from lorafit.training.loop import Outcome, TrainContext
from lorafit.verify.proof import Proof, prove
from lorafit.verify.reload import PROBE_ROWS


def finish(
    config: Config,
    training_data: TrainingData,
    job: TrainContext,
    state: TrainState,
    outcome: Outcome,
    seconds: float,
    initial: Mapping[str, str],
) -> tuple[Path, bool | None]:
    """The folder of the adapter, and whether the proof passed (None without one). For the first rank only.

    `seconds` is what the steps took, `initial` the digests of the adapter's tensors before the first step.
    """
    run, observe = job.run, job.observe
    if outcome == "interrupted":
        adapter, proven = run.checkpoint(state.step), None
        observe(Message(f"go on with: lorafit train --resume {run.path}"))
    else:
        if outcome == "ended early":
            count = state.num_worse
            observe(Message(f"ended early: {count} held-out measurements in a row were no better"))
        adapter, proven = run.adapter, None
        step = _export_best(config, job, state)
        if job.engine.lockstep:  # the first rank alone has no whole base to generate or compare with
            text = "no rank holds the whole base: no samples are generated and nothing is verified"
            observe(Message(text, "warning"))
        else:
            if samples := job.samples.generate_samples():
                run.write_json(run.samples_file, samples)
            if config.run.verify:
                continued = config.lora.init_from is not None
                proof = _prove(job, training_data, initial, step=step, continued=continued)
                proven = proof.verdict != "fail"
    with suppress(RunError):  # if an older checkpoint still cannot be removed, the next start tries again
        run.clean()
    observe(RunEnded(state.step, outcome, seconds, str(adapter), state.last_loss or 0.0))
    leave_report(run, observe)
    return adapter, proven


def _export_best(config: Config, job: TrainContext, state: TrainState) -> int:
    """Export the adapter of the best step, or of the last one; returns that step. The network has this adapter."""
    run, observe = job.run, job.observe
    best = state.best_step if config.train.keep_best and state.best_step else state.step
    if best != state.step and (faults := verify_folder(run.checkpoint(best))):
        observe(Message(f"the best step, {best}, is lost ({faults[0]}): the last one counts", "warning"))
        best = state.step
    export_adapter(run.adapter, run.checkpoint(best), run.prompt_file, {"step": best, **job.facts})
    if best != state.step:
        observe(Message(f"the adapter is the one of step {best}, the lowest held-out loss"))
        load_adapter(job.network, run.adapter)
    return best


def _prove(
    job: TrainContext, training_data: TrainingData, initial: Mapping[str, str], *, step: int, continued: bool
) -> Proof:
    """Prove the final adapter, of `step`, and store the proof; the network's memory is released."""

    def prompts(count: int) -> Sequence[Row]:
        try:
            return training_data.prompts(count)
        except (LorafitError, OSError, StopIteration):  # the files have changed
            return training_data.samples

    proof = prove(
        job.run,
        Model(job.network, training_data.renderer),
        step=step,
        initial=initial,
        continued=continued,
        rows=training_data.fixed_rows(PROBE_ROWS),
        prompts=prompts,
        losses=_losses(job.run, step),
        observe=job.observe,
    )
    job.run.write_json(job.run.proof_file, proof.to_json())
    job.observe(proof.event())
    return proof


def _losses(run: RunDirectory, step: int) -> tuple[float | None, float | None]:
    """The measured held-out losses of the base and of the adapter of `step`."""
    measured = [event for event in read_whole_events(run.metrics_file)[0] if event.get("event") == "heldout"]
    of_step = [event for event in measured if event.get("step") == step]
    last = of_step[-1] if of_step else {}
    return last.get("base_loss"), last.get("loss")


def leave_report(run: RunDirectory, observe: Observer) -> None:
    """Write report.html. A report that cannot be written is a warning."""
    observe(Message(f"report {run.report_file}"))  # before: the report holds the messages
    try:
        write_report(run)
    except LorafitError as error:
        observe(Message(f"no report: {error.problems[0].message}", "warning"))
