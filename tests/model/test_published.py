"""Every published type as transformers writes it: the same logits, gradients and answers, and adapters that PEFT reads.

A new type is one line of PUBLISHED in tests/tiny_models.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.model.published import exact, theirs, with_adapters, write_published
from tests.tiny_models import HYBRIDS, PUBLISHED, config_of
from torch import Tensor

from lorafit.data.packing import Packer
from lorafit.errors import ConfigError
from lorafit.forward import pack_loss
from lorafit.infer.continuous_batch import Request, generate_tokens
from lorafit.model.adapter_file import adapter_files, adapter_tensors
from lorafit.model.architecture import parse_architecture, read_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.device import pick_dtype
from lorafit.model.families import FAMILIES
from lorafit.model.llama import Llama, embedding_multiplier
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.loss import loss_sum
from lorafit.model.saved_adapter import put_on, read_adapter
from lorafit.model.weights import load_network

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LENGTHS = [9, 1, 14, 26]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
IDS = torch.randint(0, 256, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(0, 256, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = write_published(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


def ours(folder: Path, dtype: torch.dtype = torch.float32, quantize: str = "none") -> Llama:
    arch = read_architecture(folder)
    return load_network(folder, arch, dtype, torch.device("cpu"), None, quantize)  # type: ignore[arg-type]


def loss_of(network: Llama, ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(logits, mean loss) of a pack."""
    hidden = network.hidden(ids, PackedDocuments(lengths))
    total = loss_sum(
        network.normed(hidden), network.lm_head.weight, TARGETS[: len(ids)], None, network.arch.logits_cap
    )
    return network.logits(hidden), total / len(ids)


def num_linears(network: Llama) -> int:
    return sum(len(network.arch.linears(layer)) for layer in range(network.arch.num_hidden_layers))


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("family", PUBLISHED)
def test_logits_and_gradients_equal_transformers_and_peft(
    family: str, dtype: torch.dtype, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, model = ours(folders(family), dtype), theirs(folders(family), dtype)
    assert network.arch.num_parameters == sum(parameter.numel() for parameter in network.parameters())
    assert dict(network.named_parameters()).keys() == dict(model.named_parameters()).keys()
    if dtype == torch.float64:
        exact(monkeypatch)
    model, pairs = with_adapters(network, model)
    logits, loss = loss_of(network, IDS, LENGTHS)
    loss.backward()
    peer_logits = torch.cat([model(input_ids=part[None]).logits[0] for part in IDS.split(LENGTHS)])
    torch.nn.functional.cross_entropy(peer_logits, TARGETS).backward()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(logits, peer_logits, rtol=tolerance, atol=tolerance)
    assert len(pairs) == 2 * num_linears(network)
    for name, (mine, peers) in pairs.items():
        assert mine.grad is not None
        assert mine.grad.abs().max() > 0, name
        torch.testing.assert_close(mine.grad, peers.grad, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("family", PUBLISHED)
def test_neighbours_change_no_bit(family: str, folders: Folders) -> None:
    network = ours(folders(family), torch.bfloat16)
    attach(network, LoraSpec(4, 8.0, 0.0, ("all-linear",), False), seed=0)
    results = []
    for number in range(2):
        ids = IDS.clone()
        ids[:10], ids[24:] = ids[:10] + number, ids[24:] + number
        for parameter in network.parameters():
            parameter.grad = None
        hidden = network.hidden(ids, PackedDocuments(LENGTHS))[10:24]
        network.logits(hidden).float().logsumexp(-1).sum().backward()
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        results.append([hidden.detach(), *gradients])
    assert len(results[0]) == 1 + 2 * num_linears(network)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("family", PUBLISHED)
def test_int8_is_near_float32(family: str, folders: Folders) -> None:
    with torch.no_grad():
        logits, eight = (
            loss_of(ours(folders(family), quantize=quantize), IDS, LENGTHS)[0]
            for quantize in ("none", "int8")
        )
    most = 0.05 if read_architecture(folders(family)).mixers else 0.03  # products of three linears
    assert (logits - eight).norm() <= most * logits.norm()


@pytest.mark.slow
@pytest.mark.parametrize("family", PUBLISHED)
def test_peft_reads_the_adapter_and_its_model_answers_alike(
    family: str, folders: Folders, tmp_path: Path
) -> None:
    import peft

    network, model = ours(folders(family)), theirs(folders(family))
    spec = attach(network, LoraSpec(4, 8.0, 0.0, ("all-linear",), False), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for name, content in adapter_files(adapter_tensors(network), spec, "base", None).items():
        (tmp_path / name).write_bytes(content)
    model = peft.PeftModel.from_pretrained(model, tmp_path)
    again = ours(folders(family))
    put_on(again, read_adapter(tmp_path))
    with torch.no_grad():
        logits = network.logits(network.hidden(IDS, PackedDocuments([len(IDS)])))
        peers = model(input_ids=IDS[None]).logits[0]
        same = again.logits(again.hidden(IDS, PackedDocuments([len(IDS)])))
        base = theirs(folders(family))(input_ids=IDS[None]).logits[0]
    assert torch.equal(logits, same)
    torch.testing.assert_close(logits, peers, rtol=1e-5, atol=1e-5)
    assert (base - peers).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("family", PUBLISHED)
def test_greedy_answers_equal_those_of_transformers(family: str, folders: Folders) -> None:
    network, model = ours(folders(family)), theirs(folders(family))
    prompts = [IDS[:2].tolist(), IDS[2:14].tolist()]
    if family in HYBRIDS:  # states end with their prompt, and slots are used again
        random = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 20, (48,), generator=random).tolist()
        prompts += [torch.randint(0, 250, (length,), generator=random).tolist() for length in lengths]
    answers: list[list[int]] = [[] for _ in prompts]
    requests = [Request(prompt, frozenset({-1}), 8) for prompt in prompts]
    for row, token in generate_tokens(network, requests):
        answers[row].append(token.id)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            said = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=-1,
            )
        assert said[0, len(prompt) :].tolist() == answer


@pytest.mark.parametrize(
    "model_type", [name for name in FAMILIES if name not in ("llama", "mistral", "qwen2", "qwen3")]
)
def test_absent_fields_have_the_values_of_transformers(model_type: str) -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    own = {"num_local_experts": 0, "layer_types": ["attention"] * 12} if "moe" in model_type else {}
    config = transformers.AutoConfig.for_model(model_type, num_hidden_layers=12, **own).to_dict()
    given = {"model_type": model_type, **{name: config[name] for name in sizes}, **own}
    assert parse_architecture(given, "") == parse_architecture(config, "")


@pytest.mark.parametrize("family", ["gemma2", "granite", "granite4"])
def test_the_loss_of_training_has_the_divisor_and_the_cap_of_logits(family: str, folders: Folders) -> None:
    row = IDS[:26].numpy().astype(np.uint16), np.arange(26) >= 9
    (pack,) = Packer(64).packs([row])
    with torch.no_grad():
        loss = pack_loss(ours(folders(family)), pack)
        logits = theirs(folders(family))(input_ids=IDS[None, :26]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[8:25], IDS[9:26], reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_gemma_scales_embeddings_in_the_type_of_the_weights(folders: Folders) -> None:
    """The root of 2,304 is 48, that of 32 is 5.6568...: in bfloat16 it is 5.65625, and the product is rounded again."""
    network, model = (make(folders("gemma3"), torch.bfloat16) for make in (ours, theirs))
    factor = embedding_multiplier(network.arch, torch.bfloat16)
    assert float(factor) == 5.65625
    mine = network.decoder.embed_tokens(IDS) * factor
    assert torch.equal(mine, model.model.embed_tokens(IDS))


def test_weights_of_gemmas_norms_are_not_rounded_with_the_one(folders: Folders) -> None:
    network, model = (make(folders("gemma3"), torch.bfloat16) for make in (ours, theirs))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for norm, peer in ((network.decoder.norm, model.model.norm),):
        norm.weight.data.copy_(torch.full((32,), 0.001))  # 1.001 is 1 in bfloat16
        peer.weight.data.copy_(norm.weight)
        assert torch.equal(norm(x), peer(x))
        norm.weight.data.copy_(torch.randn(32) * 0.3)
        peer.weight.data.copy_(norm.weight)
        assert torch.equal(norm(x), peer(x))


def test_gemma_is_not_computed_in_float16(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its residual stream exceeds 65,504, as published: the type is refused, and not chosen for an older GPU."""
    assert [name for name, family in FAMILIES.items() if not family.fits_float16] == ["gemma3_text", "gemma2"]
    with pytest.raises(ConfigError, match="exceed the largest number of float16"):
        pick_dtype("float16", torch.device("cpu"), fits_float16=False)
    assert pick_dtype("float16", torch.device("cpu")) == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert pick_dtype("auto", torch.device("cuda")) == torch.float16
    with caplog.at_level(logging.WARNING):
        assert pick_dtype("auto", torch.device("cuda"), fits_float16=False) == torch.float32
    assert "computed in float32" in caplog.text


def test_longrope_changes_its_factors_beyond_the_original_length(folders: Folders) -> None:
    network, model = ours(folders("phi3-longrope")), theirs(folders("phi3-longrope"))
    assert network.arch.fixed_up_to == 20
    assert network.arch.longest_row == 20
    with torch.no_grad():
        for length in (19, 20, 21, 40):
            ids = IDS[:length]
            mine = network.logits(network.hidden(ids, PackedDocuments([length])))
            torch.testing.assert_close(mine, model(input_ids=ids[None]).logits[0], rtol=1e-5, atol=1e-5)
    short, long = (network.rotary(PackedDocuments([length]), torch.float32)[0][0][19] for length in (20, 21))
    assert not torch.equal(short, long)


def test_windows_and_ropes_by_layer_are_those_of_the_configs() -> None:
    def read(family: str, **changes: object) -> tuple[list[int | None], list[float | None]]:
        config = {key: value for key, value in config_of(family).items() if key != "layer_types"}
        arch = parse_architecture({**config, "num_hidden_layers": 8, **changes}, "")
        ropes = arch.ropes or (arch.rope,) * 8
        return list(arch.windows), [rope and rope.theta for rope in ropes]

    windows, thetas = read("gemma3", rope_theta=1e6, rope_local_base_freq=1e4)
    assert windows == [5, 5, 5, 5, 5, None, 5, 5]
    assert thetas == [1e4] * 5 + [1e6] + [1e4] * 2
    assert read("gemma3", sliding_window_pattern=4)[0] == [5, 5, 5, None] * 2
    assert read("gemma2")[0] == [5, None] * 4
    assert read("olmo3")[0] == [5, 5, 5, None] * 2
    assert read("smollm3", no_rope_layers=None)[1] == [1e4, 1e4, 1e4, None] * 2
    assert read("exaone4-window", sliding_window_pattern="LLLG") == (
        [5, 5, 5, None] * 2,
        [1e4, 1e4, 1e4, None] * 2,
    )


@pytest.mark.parametrize("family", ["smollm3", "gemma3", "phi3-longrope", "granite", "granite4", "ernie4_5"])
def test_a_tied_head_is_the_embedding(family: str, folders: Folders) -> None:
    network = ours(folders(family))
    assert network.lm_head.weight is network.decoder.embed_tokens.weight


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("granite4", {"layer_types": ["mamba", "attention"]}, "only layers of the type attention"),
        ("granite4", {"num_local_experts": 4}, "networks with experts"),
        ("gemma3", {"use_bidirectional_attention": True}, "only causal attention"),
        ("gemma3", {"hidden_activation": "relu"}, "only `gelu_pytorch_tanh`"),
        ("phi3", {"partial_rotary_factor": 0.1}, "a part of a head"),
        ("smollm3", {"no_rope_layers": [1]}, "a 1 or a 0 for each of 2 layers"),
        ("olmo3", {"layer_types": ["full_attention", "strange"]}, "expected 2 of 'full_attention'"),
    ],
)
def test_what_is_not_computed_is_refused(family: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        parse_architecture({**config_of(family), **changes}, "config.json")
