"""What follows the last step: the model speaks, what lies on disk is proven, and the report is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.data.build import TrainingData
from lorafit.data.formats import Row
from lorafit.data.row_preview import excerpt
from lorafit.errors import LorafitError
from lorafit.evaluate.samples import SampleGenerator
from lorafit.infer.model import Model
from lorafit.model.llama import Llama
from lorafit.observe.events import Message, Observer
from lorafit.observe.metrics_file import read_whole_events
from lorafit.report.page import write_report
from lorafit.run_dir import RunDirectory
from lorafit.verify.proof import Proof, prove
from lorafit.verify.reload import PROBE_ROWS


def excerpt_of(training_data: TrainingData) -> dict[str, Any]:
    """What the report shows of the rows, for rows.json."""
    return excerpt(
        training_data.training, training_data.heldout, training_data.tokenizer, training_data.place
    )


def speaker_of(network: Llama, training_data: TrainingData, observe: Observer) -> SampleGenerator:
    """Who answers the run's held-out prompts."""
    return SampleGenerator(Model(network, training_data.renderer), training_data.samples, observe)


def speak(run: RunDirectory, speaker: SampleGenerator) -> None:
    """Base and tuned answers to the held-out prompts, shown and stored in samples.json."""
    if samples := speaker.generate_samples():
        run.write_json(run.samples_file, samples)


def prove_run(
    run: RunDirectory,
    network: Llama,
    training_data: TrainingData,
    initial: Mapping[str, str],
    *,
    step: int,
    continued: bool,
    observe: Observer,
) -> Proof:
    """Prove the final adapter, of `step`, and store the proof in proof.json; the network's memory is given up."""

    def prompts(count: int) -> Sequence[Row]:
        try:
            return training_data.prompts(count)
        except (LorafitError, OSError, StopIteration):  # the files are others by now
            return training_data.samples

    proof = prove(
        run,
        Model(network, training_data.renderer),
        step=step,
        initial=initial,
        continued=continued,
        rows=training_data.fixed_rows(PROBE_ROWS),
        prompts=prompts,
        losses=_losses(run, step),
        observe=observe,
    )
    run.write_json(run.proof_file, proof.to_json())
    observe(proof.event())
    return proof


def _losses(run: RunDirectory, step: int) -> tuple[float | None, float | None]:
    """The held-out losses of the base and of the adapter of `step`, as they were measured."""
    measured = [event for event in read_whole_events(run.metrics_file)[0] if event.get("event") == "heldout"]
    of_step = [event for event in measured if event.get("step") == step]
    last = of_step[-1] if of_step else {}
    return last.get("base_loss"), last.get("loss")


def leave_report(run: RunDirectory, observe: Observer) -> None:
    """Write report.html; where that fails it is said, and the run is as good as without."""
    observe(Message(f"report {run.report_file}"))  # before: the report holds what was said
    try:
        write_report(run)
    except LorafitError as error:
        observe(Message(f"no report: {error.problems[0].message}", "warning"))
