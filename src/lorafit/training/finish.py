"""After the last step: export the adapter, generate samples, verify what is on disk, write the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorafit.data.formats import Row
from lorafit.errors import LorafitError, RunError
from lorafit.evaluate.learned import what_was_learned
from lorafit.infer.model import Model
from lorafit.model.adapter_file import adapter_tensors, fill_adapter, load_adapter
from lorafit.model.memory import is_out_of_memory
from lorafit.observe.events import Learned, LearnedLevel, Message, Observer, Preferences, RunEnded
from lorafit.observe.metrics_file import event_of, read_raw_lines
from lorafit.redact import shell
from lorafit.report.page import write_report
from lorafit.report.rows_of_run import page_values
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import sha256_file, verify_folder
from lorafit.training.answers import drift
from lorafit.training.checkpoint import TrainState, export_adapter
from lorafit.training.loop import Outcome, TrainContext
from lorafit.verify.proof import STOP_PROMPTS, Proof, prove
from lorafit.verify.reload import PROBE_ROWS

_MOST, _MORE = 0.7, 0.55  # shares of held-out rows in order


def finish(
    job: TrainContext, state: TrainState, outcome: Outcome, seconds: float, initial: Mapping[str, str]
) -> tuple[Path, bool | None]:
    """The folder of the adapter, and whether the proof passed (None without one). For the first rank only.

    `seconds` is what the steps took, `initial` the digests of the adapter's tensors before the first step.
    """
    run, observe = job.run, job.observe
    adapter, proven = run.adapter, None
    if outcome == "interrupted":
        adapter = run.checkpoint(state.step)
        observe(Message(f"continue with: {shell('lorafit', 'train', '--resume', run.path)}"))
    else:
        observe_early_end(job, state, outcome)
        step = _export_best(job, state)
        if job.engine.lockstep:  # the first rank alone has no whole base to generate or compare with
            text = "no rank holds the whole base: no samples are generated and nothing is verified"
            observe(Message(text, "warning"))
        else:
            observe_drift(job, _last(run, state.chosen_step or step, "preferences"))
            if samples := job.samples.generate_samples(trained=not job.heldout):
                run.write_json(run.samples_file, with_start(job, samples))
            learned = _learned(
                job, state.chosen_step or step, outcome
            )  # before the proof, which releases the network
            if job.config.run.verify:
                proof = _prove(job, initial, step, state.chosen_step or step)
                run.write_json(run.proof_file, proof.to_json())
                observe(proof.event())
                proven = proof.verdict != "fail"
            if learned is not None:
                observe(learned)
        try:
            run.write_json(run.row_list_file, page_values(run, job.data))
        except LorafitError as error:
            observe(Message(f"no list of rows: {error.problems[0].message}", "warning"))
    run.check_held()
    with suppress(RunError):  # if an older checkpoint still cannot be removed, the next start tries again
        run.clean()
    observe(RunEnded(state.step, outcome, seconds, str(adapter), state.last_loss or 0.0))
    leave_report(run, observe)
    return adapter, proven


def _export_best(job: TrainContext, state: TrainState) -> int:
    """Export the adapter of the best step, or of the last one; returns that step. The network has this adapter."""
    run, observe = job.run, job.observe
    best = state.best_step if job.config.train.keep_best and state.best_step else state.step
    if best != state.step and (faults := verify_folder(run.checkpoint(best))):
        observe(Message(f"the best step, {best}, is lost ({faults[0]}): the last one counts", "warning"))
        best = state.step
    facts = {
        "step": best,
        **job.facts,
        "trained_rows": len(job.rows),
        "config_file": sha256_file(run.config_file),
    }
    export_adapter(run.adapter, run.checkpoint(best), run.prompt_file, facts, run.check_held)
    if best != state.step:
        observe(Message(f"the adapter is the one of step {best}, the best by the held-out loss"))
        load_adapter(job.network, run.adapter)
    return best


def observe_early_end(job: TrainContext, state: TrainState, outcome: Outcome) -> None:
    """Report why the first phase ended before its last step, if it did."""
    if state.too_far:
        most, before = (
            job.config.train.max_drift,
            "the best one before is taken" if state.best_step else "it stays",
        )
        job.observe(
            Message(f"the adapter of step {state.step} moved further than {most:g}: {before}", "warning")
        )
    elif outcome == "ended early":
        count = state.num_worse
        job.observe(Message(f"ended early: {count} held-out measurements in a row were no better"))


def observe_drift(job: TrainContext, last: Mapping[str, Any]) -> None:
    """Report `last`, the last event of held-out preferences, once more with the drift of the final adapter."""
    if job.reference is None or last.get("rows") != "heldout":
        return
    fields = {name: value for name, value in last.items() if name in Preferences.__dataclass_fields__}
    job.observe(Preferences(**fields | {"drift": drift(job.network, job.heldout, job.reference.adapter)}))


def with_start(job: TrainContext, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`samples` with the answers of the starting point, where that is an adapter: base, SFT and tuned."""
    if job.reference is None or job.config.lora.init_from is None:
        return samples
    final = {name: tensor.clone() for name, tensor in adapter_tensors(job.network).items()}
    fill_adapter(job.network, job.reference.adapter, job.run.path)
    answers = job.samples.tuned()
    fill_adapter(job.network, final, job.run.path)
    return [{**sample, "start": asdict(answer)} for sample, answer in zip(samples, answers, strict=True)]


def _learned(job: TrainContext, step: int, outcome: Outcome) -> Learned | None:
    """What the final adapter has learned, with the losses of `step`; None where memory is short."""
    losses = _losses(job.run, step)
    if job.objective.loss is not None:
        return preferences_learned(step, _last(job.run, step, "preferences"))
    data = job.data if job.heldout else job.data.with_all_rows()
    try:
        return what_was_learned(
            job.network,
            data,
            job.packer,
            step=step,
            losses=losses,
            longer=_longer(job, outcome),
            observe=job.observe,
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        job.observe(Message("no memory to ask trained rows: what was learned is not known", "warning"))
        return None


def _longer(job: TrainContext, outcome: Outcome) -> str:
    """How to train longer than this run, as a setting."""
    settings = job.config.train
    if outcome == "ended early":
        return "the held-out rows ended the run, train.patience=0 trains on"
    if settings.budget is not None:
        return f"train longer, with more than train.budget={settings.budget}"
    if settings.max_steps is not None:
        return f"train longer, for example train.max_steps={2 * settings.max_steps}"
    return f"train longer, for example train.epochs={2 * settings.epochs:g}"


def _prove(job: TrainContext, initial: Mapping[str, str], step: int, measured: int) -> Proof:
    """The proof of the final adapter, of `step`, with the losses of step `measured`. The network's memory is freed."""
    try:
        prompts: Sequence[Row] = job.data.prompts(STOP_PROMPTS)
    except (LorafitError, OSError, StopIteration):  # the files have changed
        prompts = job.data.samples
    return prove(
        job.run,
        Model(job.network, job.data.renderer),
        step=step,
        initial=initial,
        continued=job.config.lora.init_from is not None,
        rows=job.data.fixed_rows(PROBE_ROWS),
        prompts=prompts,
        trained=not job.heldout,
        losses=_losses(job.run, measured),
        observe=job.observe,
    )


def _losses(run: RunDirectory, step: int) -> tuple[float | None, float | None]:
    """The measured held-out losses of the base and of the adapter of `step`."""
    last = _last(run, step, "heldout")
    return last.get("base_loss"), last.get("loss")


def _last(run: RunDirectory, step: int, kind: str) -> Mapping[str, Any]:
    """The last event of a kind after `step` in the metrics, empty where there is none."""
    last: Mapping[str, Any] = {}
    for event in map(event_of, read_raw_lines(run.metrics_file)):
        if event is not None and event.get("event") == kind and event.get("step") == step:
            last = event
    return last


def preferences_learned(step: int, last: Mapping[str, Any]) -> Learned:
    """What the held-out pairs say, measured after `step`."""
    if last.get("rows") != "heldout":
        return Learned(step, "unknown", "What it learned is not known: no pair was held out", {})
    share = last["accuracy"]
    level: LearnedLevel = "learned" if share >= _MOST else "partly" if share >= _MORE else "nothing"
    how = {"learned": "It learned the preference", "partly": "It learned a part of the preference"}
    text = (
        f"{how.get(level, 'It did not learn the preference')}: {share:.0%} of the held-out rows are in order"
    )
    if last.get("margin") is not None:
        text += f", with a mean margin of {last['margin']:.2f}"
    before, now = last.get("prefers") or (None, None)
    if before is not None and now is not None:
        text += f"; the chosen answer is the more probable one per token in {now:.0%} ({before:.0%} before)"
    if level == "nothing":
        text += ": check the pairs, or raise train.learning_rate"
    return Learned(step, level, text, {})


def leave_report(run: RunDirectory, observe: Observer) -> None:
    """Write report.html. A report that cannot be written is a warning."""
    run.check_held()
    observe(Message(f"report {run.report_file}"))  # before: the report holds the messages
    try:
        write_report(run)
    except LorafitError as error:
        observe(Message(f"no report: {error.problems[0].message}", "warning"))
