"""Models that answer: loaded from a run, an adapter or a base, whole or streamed, and never a damaged one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.runs import tiny_run, tiny_settings
from tests.tiny_models import byte_tokenizer, write_model

from lorafit.data.formats import Chat, Instruction, Message
from lorafit.errors import DataError, LorafitError, ModelError, RunError
from lorafit.infer import model as model_module
from lorafit.infer.continuous_batch import GeneratedToken
from lorafit.infer.model import Model, load
from lorafit.infer.sampling import Sampling
from lorafit.model.attention import PackedDocuments
from lorafit.model.linear import Frozen

QUESTIONS = ["What is a llama?", "라마가 뭐야?", "Say 7."]
ON_CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose adapter says something else than its base."""
    folder = tmp_path_factory.mktemp("infer")
    model = write_model(folder / "model", max_position_embeddings=200)
    settings = tiny_settings(folder, "train.max_steps=3", "train.learning_rate=0.05", model=model)
    return tiny_run(settings, folder / "run").path


@pytest.fixture(scope="module")
def tuned(trained: Path) -> Model:
    return load(trained, device="cpu")


def texts(model: Model, **settings: Any) -> list[str]:
    return [answer.text for answer in model.generate(QUESTIONS, max_tokens=12, **settings)]


def logits_of(model: Model) -> torch.Tensor:
    ids = torch.arange(20)
    return model.network.logits(model.network.hidden(ids, PackedDocuments([20]))).detach()


def test_a_run_its_adapter_and_the_adapter_on_its_base_answer_alike(trained: Path, tuned: Model) -> None:
    base = trained.parent / "model"
    alike = [
        load(str(trained), device="cpu"),
        load(trained / "adapter", **ON_CPU),
        load(base, adapter=trained / "adapter", **ON_CPU),
    ]
    for model in alike:
        assert model.has_adapter
        assert texts(model) == texts(tuned)
    assert texts(load(base, **ON_CPU)) != texts(tuned)


def test_base_leaves_the_adapter_out_and_puts_it_back(trained: Path, tuned: Model) -> None:
    base = load(trained.parent / "model", **ON_CPU)
    assert not base.has_adapter
    before, logits = texts(tuned), logits_of(tuned)
    assert not torch.equal(logits, logits_of(base))
    assert texts(tuned, base=True) == texts(base) != before
    assert texts(tuned) == before
    pieces = tuned.stream(QUESTIONS[0], max_tokens=12, base=True)
    next(pieces, None)
    pieces.close()  # type: ignore[attr-defined]  an answer that nobody waits for
    assert torch.equal(logits_of(tuned), logits)  # what comes next, such as a training step, sees the adapter
    assert texts(tuned) == before


def test_answers_come_in_order_however_many(tuned: Model) -> None:
    many = [f"Say {index}." for index in range(19)]
    together = tuned.generate(many, max_tokens=4)
    assert [answer.text for answer in together] == [
        tuned.generate([one], max_tokens=4)[0].text for one in many
    ]
    assert tuned.generate([], max_tokens=4) == []


def test_the_same_question_is_sampled_anew_in_every_batch(tuned: Model) -> None:
    answers = tuned.generate(["Say 7."] * 34, max_tokens=12, sampling=Sampling(2.0))
    assert len({answer.text for answer in answers}) == 34


def test_an_answer_counts_its_tokens_and_says_whether_it_ended(
    tuned: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [
        (0, GeneratedToken(72)),
        (1, GeneratedToken(72)),
        (0, GeneratedToken(257, "stop")),
        (1, GeneratedToken(73, "length")),
    ]
    monkeypatch.setattr(model_module, "generate_tokens", lambda *_: iter(tokens))
    alphabet = byte_tokenizer()
    one, two = tuned.generate(["a", "b"])
    assert (one.text, one.num_tokens, one.stopped) == (alphabet.decode([72]), 1, True)
    assert (two.text, two.num_tokens, two.stopped) == (alphabet.decode([72, 73]), 2, False)


def test_a_question_may_be_text_a_row_or_a_conversation(tuned: Model) -> None:
    forms = [
        "Say 7.",
        Instruction("Say 7.", "", ""),
        [Message("user", "Say 7.")],
        Chat((Message("user", "Say 7."), Message("assistant", "unseen"))),
    ]
    assert len({answer.text for answer in tuned.generate(forms, max_tokens=8)}) == 1
    with pytest.raises(DataError, match="the conversation is empty"):
        tuned.generate([[]])


def test_a_prompt_that_does_not_fit_is_refused(tuned: Model) -> None:
    with pytest.raises(ModelError, match="a prompt has 2.. tokens, the model reads at most 199"):
        tuned.generate(["x" * 200])


def test_the_system_prompt_is_read(trained: Path, tuned: Model) -> None:
    other = load(trained, device="cpu", system="Speak like a pirate.")
    asked = tuned.renderer.prompt_ids([Message("system", "Speak like a pirate."), Message("user", "Hi")])
    assert other.renderer.prompt_ids([Message("user", "Hi")]) == asked
    assert tuned.renderer.prompt_ids([Message("user", "Hi")]) != asked


def broken_copy(trained: Path, target: Path) -> Path:
    shutil.copytree(trained, target)
    return target


def test_a_damaged_adapter_does_not_answer(trained: Path, tmp_path: Path) -> None:
    run = broken_copy(trained, tmp_path / "run")
    weights = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunError, match="the adapter is damaged: .*SHA-256 differs"):
        load(run)
    weights.write_bytes(content[:-5])
    with pytest.raises(ModelError, match="the adapter is damaged: .* were written"):
        load(run / "adapter", **ON_CPU)


def test_an_adapter_that_is_not_the_models_does_not_answer(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", folder)
    (folder / "manifest.json").unlink()  # as an adapter made elsewhere
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    for changed, message in (
        ({**tensors, name: tensors[name] * torch.nan}, "not finite"),
        ({**tensors, name: tensors[name][:, :-1].contiguous()}, "has shape"),
        ({key: value for key, value in tensors.items() if key != name}, "is missing"),
        ({**tensors, "more": torch.zeros(1)}, "fits nothing"),
    ):
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=message):
            load(folder, **ON_CPU)


def test_what_is_nothing_to_answer_with_is_refused_with_a_reason(trained: Path, tmp_path: Path) -> None:
    adapter = broken_copy(trained / "adapter", tmp_path / "adapter")
    with pytest.raises(ModelError, match="an adapter cannot be put on an adapter"):
        load(adapter, adapter=adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="does not name its base model"):
        load(adapter)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="there are no weights here"):
        load(tmp_path / "empty")
    run = broken_copy(trained, tmp_path / "run")
    (run / "prompt.json").write_text("{")
    with pytest.raises(RunError, match=r"`prompt.json` cannot be read"):
        load(run)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunError, match="the run has no adapter yet"):
        load(run)
    with pytest.raises(LorafitError):
        load(tmp_path / "nowhere" / "at" / "all", offline=True)


def test_a_run_that_was_stopped_answers_from_its_newest_whole_checkpoint(
    trained: Path, tuned: Model, tmp_path: Path
) -> None:
    run = broken_copy(trained, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    assert texts(load(run, device="cpu")) == texts(tuned)


def says(ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*_: Any) -> Iterator[tuple[int, GeneratedToken]]:
        for number, token in enumerate(ids, 1):
            yield 0, GeneratedToken(token, "length" if number == len(ids) else "")

    monkeypatch.setattr(model_module, "generate_tokens", generate)


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(ANY_TEXT.map(lambda text: byte_tokenizer().encode(text, add_special_tokens=False).ids))
def test_streamed_text_joins_to_the_whole_answer(tuned: Model, ids: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        says(ids, patch)
        pieces = list(tuned.stream("x"))
        assert "".join(pieces) == tuned.generate(["x"])[0].text
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in byte_tokenizer().decode(ids)


@given(st.lists(st.integers(0, 259), min_size=1, max_size=12))
def test_streamed_bytes_join_to_the_whole_answer_even_where_they_are_no_text(
    tuned: Model, ids: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        says(ids, patch)
        assert "".join(tuned.stream("x")) == tuned.generate(["x"])[0].text


def test_characters_of_several_bytes_come_whole(tuned: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    says(byte_tokenizer().encode("é라🦙", add_special_tokens=False).ids, monkeypatch)
    assert list(tuned.stream("x")) == ["é", "라", "🦙"]


def test_real_answers_stream_to_the_same_text(tuned: Model) -> None:
    for question, whole in zip(QUESTIONS, texts(tuned), strict=True):
        assert "".join(tuned.stream(question, max_tokens=12)) == whole


def test_streamed_text_has_no_white_space_at_its_ends(tuned: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    says(byte_tokenizer().encode(" \n a  b\n ", add_special_tokens=False).ids, monkeypatch)
    assert list(tuned.stream("x")) == ["a", "  b"]


def test_a_prompt_that_renders_to_nothing_is_refused(tuned: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tuned.renderer), "prompt_ids", lambda *_: [])
    with pytest.raises(ModelError, match="a prompt has no tokens"):
        tuned.generate(["x"])


def held_as(model: Model) -> set[str]:
    """The classes of the frozen linears."""
    return {type(module).__name__ for module in model.network.modules() if isinstance(module, Frozen)}


def test_a_run_answers_with_the_bits_it_was_trained_with_unless_told_otherwise(
    trained: Path, tuned: Model, tmp_path: Path
) -> None:
    assert held_as(tuned) == {"Linear"}
    assert held_as(load(trained, device="cpu", quantize="int8")) == {"Int8Linear"}
    run = broken_copy(trained, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    assert "quantize: none" in config
    (run / "config.yaml").write_text(config.replace("quantize: none", "quantize: int8"))
    assert held_as(load(run, device="cpu")) == {"Int8Linear"}
    assert held_as(load(run, device="cpu", quantize="none")) == {"Linear"}
    assert held_as(load(trained / "adapter", **ON_CPU)) == {"Linear"}
    assert len(texts(load(run, device="cpu"))) == len(QUESTIONS)


@pytest.mark.shared
@pytest.mark.parametrize("rows", [1, 40])  # as tokens are added, and as prompts are read
def test_eight_bits_say_nearly_what_sixteen_say(shared: Path, rows: int) -> None:
    folder = shared / "models" / "tinystories-656k"
    sixteen, eight = (
        load(folder, device="cpu", dtype="bfloat16", quantize=quantize, offline=True).network
        for quantize in ("none", "int8")
    )
    ids = torch.randint(3, sixteen.arch.vocab_size, (400,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one, two = (
            torch.cat(
                [
                    network.logits(network.hidden(part, PackedDocuments([1] * len(part))))
                    for part in ids.split(rows)
                ]
            )
            for network in (sixteen, eight)
        )
    alike = torch.cosine_similarity(one.double(), two.double())
    assert alike.mean() > 0.999
