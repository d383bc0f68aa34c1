"""The adapter: training, types, names, and equality after loading (bugs 18, 19, 20, 22, 23, 24, 25, 28)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.bugs.catalogue import probe
from tests.bugs.lab import Lab, Plant, difference, stir
from tests.data.chat_formats import FORMATS
from tests.tiny_models import byte_tokenizer, random_network, weights_of, write_model

from lorafit import load
from lorafit.errors import ConfigError, LorafitError, ModelError
from lorafit.model.adapter_file import WEIGHTS, adapter_files, adapter_tensors
from lorafit.model.architecture import read_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, adapted, attach
from lorafit.model.weights import load_network
from lorafit.training import setup
from lorafit.training.run import Result, start_run

IDS = torch.arange(40) * 7 % 256
LEARN = ("train.max_steps=4", "train.learning_rate=0.03")


def logits_of(network: Llama, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The logits of one document, (tokens, vocab_size)."""
    with torch.inference_mode():
        return network.eval().logits(network.hidden(ids, PackedDocuments([len(ids)])))


def peft_logits(model: Path, adapter: Path | None, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The same logits from transformers, with the adapter folder loaded by peft."""
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if adapter is not None:
            theirs = peft.PeftModel.from_pretrained(theirs, adapter)
        return theirs.eval()(ids[None]).logits[0]


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tables of logits are equal except for rounding."""
    return difference({"logits": one}, {"logits": two}) < 1e-4


@probe(
    18,
    Plant("model.lora:LoraLinear.__init__", "torch.promote_types(like.dtype, torch.float32)", "like.dtype"),
    Plant(
        "model.adapter_file:adapter_tensors",
        "parameter.detach().cpu()",
        "parameter.detach().cpu().bfloat16()",
    ),
)
def small_updates_of_a_16_bit_model_are_kept(lab: Lab) -> None:
    """Steps far below the resolution of 16 bits change every matrix, in float32, also in the saved adapter."""
    start = lab.adapter(std=1.0)
    before = load_file(start / WEIGHTS)
    for dtype in ("bfloat16", "float16"):
        result = lab.run(
            f"model.dtype={dtype}",
            f"lora.init_from={start}",
            "train.learning_rate=1e-6",
            "train.warmup=0",
            name=dtype,
        )
        after = load_file(result.adapter / WEIGHTS)
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}, dtype
        assert all(not tensor.equal(before[name]) for name, tensor in after.items()), dtype


@probe(
    19,
    Plant(
        "model.llama:Llama.through_with",
        "inputs = (x, rotary",
        "inputs = (x.detach() if self.recompute else x, rotary",
    ),
    Plant(
        "model.lora_linear:_Project.backward",
        "needs_inputs = any(ctx.needs_input_grad[4 : 4 + ctx.num_inputs])",
        "needs_inputs = False",
    ),
)
def recomputation_keeps_every_gradient(lab: Lab) -> None:
    """With recomputation, the first step has the gradients of a plain step, none is zero, and every B changes."""
    lab.watch()
    for recompute in ("none", "layers"):
        options = (f"train.recompute={recompute}", f"lora.init_from={lab.adapter()}", "train.max_steps=1")
        lab.run(*options, name=recompute)
    plain, again = lab.gradients
    assert all(float(gradient.abs().max()) > 0 for gradient in again.values())
    assert difference(plain, again) < 1e-6
    fresh = lab.run("train.recompute=layers", "train.max_steps=1", "train.warmup=0", name="fresh")
    moved = [t for name, t in load_file(fresh.adapter / WEIGHTS).items() if "lora_B" in name]
    assert len(moved) == 14
    assert all(float(tensor.abs().max()) > 0 for tensor in moved)


def _live(lab: Lab, *overrides: str) -> tuple[Result, torch.Tensor, torch.Tensor]:
    """A run, and the logits of its network at the end, with and without the adapter."""
    networks: dict[str, Llama] = {}
    build = setup.build

    def recorded(*arguments: Any) -> Any:
        built = build(*arguments)
        networks["trained"] = built.network
        return built

    with lab.patch.context() as patch:
        patch.setattr(setup, "build", recorded)
        result = lab.run(*LEARN, *overrides)
    network = networks["trained"]
    tuned = logits_of(network)
    for module in adapted(network).values():
        module.enabled = False
    return result, tuned, logits_of(network)


@probe(
    20,
    Plant("model.adapter_file:adapter_tensors", "parameter.detach()", "torch.zeros_like(parameter)"),
    Plant("model.lora:LoraLinear.fill", "getattr(self, part).copy_(tensors[part])", "pass"),
)
def a_loaded_adapter_is_the_trained_one(lab: Lab) -> None:
    """The loaded adapter gives the logits of the live network, not of the base; an incomplete one is refused."""
    result, tuned, base = _live(lab)
    assert not close(tuned, base), "the adapter has no effect"
    assert close(logits_of(load(result.path, device="cpu").network), tuned)
    damaged = lab.folder / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_bytes((result.adapter / "adapter_config.json").read_bytes())
    tensors = load_file(result.adapter / WEIGHTS)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, damaged / WEIGHTS)
    try:
        load(lab.model(), adapter=damaged, device="cpu")
    except ModelError as error:
        assert "is missing" in str(error)
    else:
        raise AssertionError("an adapter with a tensor missing was loaded")


@probe(
    20,
    Plant("model.adapter_file:adapter_tensors", "parameter.detach()", "torch.zeros_like(parameter)"),
)
def a_new_process_computes_the_same_logits(lab: Lab) -> None:
    """A new process loads the adapter and computes the logits of the live network."""
    result, tuned, base = _live(lab)
    program = (
        "import sys, torch\n"
        "from safetensors.torch import save_file\n"
        "from lorafit import load\n"
        "from tests.bugs.adapters import logits_of\n"
        "save_file({'logits': logits_of(load(sys.argv[1], device='cpu').network)}, sys.argv[2])\n"
    )
    out = lab.folder / "logits.safetensors"
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", program, str(result.path.resolve()), str(out)]
    plain = {**os.environ, "LORAFIT_NATIVE": "0"}  # torch's operators: no second compilation
    done = subprocess.run(words, cwd=root, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = load_file(out)["logits"]
    assert close(loaded, tuned)
    assert not close(loaded, base)


@probe(
    22,
    Plant("model.weights:stored_weights", "if not _are_equal(", "if False and not _are_equal("),
    Plant(
        "model.weights:load_network",
        "network.lm_head.weight = network.decoder.embed_tokens.weight",
        "network.lm_head.weight = nn.Parameter(network.decoder.embed_tokens.weight.roll(1, 0), False)",
    ),
)
def tied_tables_are_one_tensor(lab: Lab) -> None:
    """The logits of a tied model equal transformers', before and after training; a head that differs is refused."""
    model = lab.model("qwen2", name="tied")
    result, tuned, base = _live(lab, f"model.name={model}")
    assert close(peft_logits(model, None), base)
    assert close(peft_logits(model, result.adapter), tuned)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    save_file(weights, model / "model.safetensors")
    try:
        load(model, device="cpu")
    except ModelError as error:
        assert "ties the head" in str(error)
    else:
        raise AssertionError("a model with two different tables was loaded")


@probe(
    23,
    Plant("model.saved_adapter:read_spec", "if raw.get(key) not in", "if raw is key and raw.get(key) not in"),
    Plant("data.build:_check_embedded", "if tokenizer.vocab_size <= num_embeddings:", "if tokenizer:"),
)
def tokens_without_an_embedding_are_refused(lab: Lab) -> None:
    """A tokenizer with added tokens, or an adapter with embeddings, is refused before the training."""
    model = lab.model(name="added")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(model / "tokenizer.json"))
    named = {
        **json.loads((model / "tokenizer_config.json").read_text()),
        "chat_template": FORMATS["chatml"].source,
    }
    (model / "tokenizer_config.json").write_text(json.dumps(named))
    _refused(lab, "has id 261, but the model has 260 embeddings", f"model.name={model}")
    for key, value in (("modules_to_save", ["embed_tokens"]), ("trainable_token_indices", [256])):
        folder = lab.adapter()
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        _refused(lab, key, f"lora.init_from={folder}")
        (folder / "adapter_config.json").write_text(json.dumps(config))


def _refused(lab: Lab, message: str, *overrides: str) -> None:
    try:
        start_run(lab.config(*overrides, name=message), quiet=True)
    except LorafitError as error:
        assert message in str(error)
    except Exception as error:
        raise AssertionError(f"it is not an error of lorafit: {error}") from error
    else:
        raise AssertionError(f"the run was not refused: {message}")


@probe(
    24,
    Plant("model.lora:match_targets", "if not matches:", "if not matches and target == 'nothing':"),
    Plant("model.lora:match_targets", "if name in chosen]", "if name in chosen and 'mlp' not in name]"),
)
def requested_targets_are_adapted_or_refused(lab: Lab) -> None:
    """lm_head with q_proj, or a misspelt name: refused. Otherwise exactly the requested modules are trained."""
    for target in ("lm_head", "embed_tokens", "q_prj"):
        try:
            start_run(lab.config(f"lora.targets=[q_proj, {target}]", name=target), quiet=True)
        except ConfigError as error:
            assert target in str(error)
        else:
            raise AssertionError(f"`{target}` was ignored without a message")
    result = lab.run("lora.targets=[q_proj, up_proj]")
    names = {name.split(".")[-3] for name in load_file(result.adapter / WEIGHTS)}
    assert names == {"q_proj", "up_proj"}


@probe(
    25,
    Plant("model.llama:inverse_frequencies", 'rope.kind == "llama3"', "False"),
    Plant("model.llama:inverse_frequencies", 'rope.kind == "linear"', "False"),
    Plant("model.llama:inverse_frequencies", 'rope.kind == "yarn"', "False"),
    Plant("model.rope:_parsed", "kind not in ROPE_KINDS", "False"),
)
def far_positions_are_scaled_as_in_the_config(lab: Lab) -> None:
    """Logits at positions beyond the original context equal transformers'; an unknown scaling is refused."""
    ids = torch.arange(200) * 7 % 256
    for family in ("llama3", "llama-linear", "llama-yarn"):
        model = write_model(lab.folder / family, family)
        network = load_network(model, read_architecture(model), torch.float32, torch.device("cpu"))
        assert close(logits_of(network, ids), peft_logits(model, None, ids)), family
    model = write_model(lab.folder / "su")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "rope_scaling": {"rope_type": "su", "factor": 4.0}})
    )
    _refused(lab, "rope types", f"model.name={model}")


@probe(
    28,
    Plant("model.lora:LoraSpec.scale", "self.alpha / (", "self.alpha * ("),
    Plant("model.adapter_file:adapter_files", '"use_rslora": spec.rslora', '"use_rslora": False'),
    Plant(
        "model.adapter_file:adapter_files",
        "int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha",
        "spec.rank",
    ),
    Plant("model.decode_linear:decode_linear", "float(linear.scale)", "1.0"),
)
def the_adapter_has_the_same_scale_in_peft(lab: Lab) -> None:
    """alpha different from rank, with and without rsLoRA: the logits equal peft's, for few and many tokens."""
    model = lab.model()
    network = random_network()
    assert all(map(torch.equal, weights_of(network).values(), weights_of(random_network()).values()))
    for alpha, rslora in ((2.0, False), (32.0, True)):
        network = random_network()
        spec = attach(network, LoraSpec(4, alpha, 0.0, ("all-linear",), rslora), seed=0)
        stir(network)
        folder = lab.folder / f"{alpha}-{rslora}"
        folder.mkdir()
        for name, content in adapter_files(adapter_tensors(network), spec, str(model), None).items():
            (folder / name).write_bytes(content)
        theirs = peft_logits(model, folder)
        assert close(logits_of(network), theirs), f"{alpha=}, {rslora=}"
        assert not close(logits_of(random_network()), theirs)
        assert close(logits_of(network, IDS[:2]), theirs[:2]), f"a short pass, {alpha=}, {rslora=}"
