"""lm-evaluation-harness asks a lorafit run: scores, greediness and answers are those of our engine, token by token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafit.data.formats import Message
from lorafit.infer.model import load
from lorafit.model.attention import PackedDocuments

pytestmark = [
    pytest.mark.slow,  # the import of the harness alone takes many seconds
    pytest.mark.filterwarnings("ignore"),  # of the harness's own imports
]


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    return finished_run


@pytest.fixture(scope="module")
def lm(run: Path) -> Any:
    from lorafit.evaluate.lm_eval import LorafitLM

    return LorafitLM(run, device="cpu", batch_tokens=64)


def asked(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def exact(lm: Any, ids: list[int], count: int) -> tuple[float, bool]:
    """The definition: one text alone, the last `count` tokens of it."""
    with torch.no_grad():
        hidden = lm._network.hidden(torch.tensor(ids[:-1]), PackedDocuments([len(ids) - 1]))
        logits = lm._network.logits(hidden).double()[-count:]
    wanted = torch.tensor(ids[-count:])
    scores = logits.log_softmax(-1).gather(1, wanted[:, None])
    return float(scores.sum()), bool((logits.argmax(-1) == wanted).all())


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cn", "Co")), max_size=12)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(texts, texts.filter(bool)), min_size=1, max_size=6))
def test_scores_are_those_of_each_text_alone(lm: Any, pairs: list[tuple[str, str]]) -> None:
    """However they are packed; and what is scored together with its context is the whole text."""
    found = lm.loglikelihood([asked(*pair) for pair in pairs])
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        ids = [256, *lm._tokenizer.encode(context + continuation)]
        count = len(lm._tokenizer.encode(context[len(context.rstrip(" ")) :] + continuation))
        wanted, is_greedy = exact(lm, ids, count)
        assert score == pytest.approx(wanted, abs=1e-3)
        assert greedy == is_greedy


def test_what_greedy_says_is_greedy(lm: Any) -> None:
    said = lm.generate_until([asked("Say it", {"max_gen_toks": 3, "until": []})])[0]
    ((_, greedy),) = lm.loglikelihood([asked("Say it", said)])
    ((_, other),) = lm.loglikelihood([asked("Say it", "\x00\x01")])
    assert (greedy, other) == (True, False)


def test_whole_texts_are_read_once_each_also_in_windows(lm: Any) -> None:
    short = "It is so."
    long = "number " * 60  # of 420 tokens, where the model reads 256
    found = lm.loglikelihood_rolling([asked(short), asked(long)])
    ids = [256, *lm._tokenizer.encode(short)]
    assert found[0] == pytest.approx(exact(lm, ids, len(ids) - 1)[0], abs=1e-3)
    assert found[1] < found[0]
    one_by_one = lm.loglikelihood_rolling([asked(long)])[0]
    assert one_by_one == pytest.approx(found[1], abs=1e-3)


def test_generation_ends_where_it_is_told(lm: Any) -> None:
    free = lm.generate_until([asked("Say the number", {"max_gen_toks": 12, "until": []})])[0]
    assert len(free) > 3
    until = free[2]
    cut = lm.generate_until([asked("Say the number", {"max_gen_toks": 12, "until": [until]})])[0]
    assert cut == free[: free.index(until)]
    mixed = lm.generate_until(
        [
            asked("Say the number", {"max_gen_toks": 12, "until": []}),
            asked("Say", {"max_gen_toks": 2, "until": []}),
        ]
    )
    assert mixed[0] == free


def test_chats_are_asked_with_the_ids_of_training(lm: Any, run: Path) -> None:
    text = lm.apply_chat_template([{"role": "user", "content": "Say </s> 7."}])
    prompt = lm._renderer.prompt_ids([Message("user", "Say </s> 7.")])
    assert prompt.count(257) == 1  # the turn's own end, not the one that was typed
    assert lm._prompt(text) == prompt
    assert lm._pair(text, " seven")[0] == prompt
    live = load(run, device="cpu").generate(["Say </s> 7."], max_tokens=6)[0].text
    assert lm.generate_until([asked(text, {"max_gen_toks": 6, "until": []})])[0].strip() == live


def test_the_harness_runs_a_local_task_on_base_and_adapter(run: Path) -> None:
    """From its own evaluator: multiple choice, so that loglikelihood decides."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    from lorafit.evaluate.lm_eval import LorafitLM

    rows = [
        {"question": f"Say the number {n}.", "choices": ["It is", "zqx"], "label": n % 2} for n in range(6)
    ]

    def local(**_: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_list(rows)}

    task = ConfigurableTask(
        config={
            "task": "local",
            "custom_dataset": local,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    )
    results = {}
    for name in ("base", "adapter"):
        model = LorafitLM(run, base=name == "base", device="cpu")
        found = lm_eval.simple_evaluate(
            model, tasks=[task], bootstrap_iters=0, log_samples=True, apply_chat_template=True
        )
        results[name] = found["results"]["local"]["acc,none"]
        for sample in found["samples"]["local"]:
            row = rows[sample["doc_id"]]
            text = model.apply_chat_template([{"role": "user", "content": row["question"]}])
            scores = model.loglikelihood([asked(text, f" {choice}") for choice in row["choices"]])  # type: ignore[union-attr]
            best = max((0, 1), key=lambda index: scores[index][0])
            assert sample["acc"] == float(best == row["label"])
    assert set(results) == {"base", "adapter"}
