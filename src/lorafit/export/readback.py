"""A process that reads an export back with the program that people will use, and scores fixed texts with it.

`python -m lorafit.export.readback REQUEST RESULT SCORES`: REQUEST and RESULT are JSON (see `parity.py`), SCORES is a
safetensors file. It has, for each token to score, text by text, its log-probability `scored` (tokens,), the most
probable token `best` (tokens,) and that one's log-probability `best_scored` (tokens,); and `first` (vocab_size,), the
log-probabilities of the first token of the first answer. It prints lines `progress DONE TOTAL`. Only this module
imports transformers, peft or llama.cpp.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lorafit.export.llama_cpp import Score, Server

_TIMED = 32  # tokens that are generated to measure the speed
Answer = tuple[dict[str, Any], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Reader:
    """A program that reads exports: the packages that it needs, and its pip extra."""

    read: Callable[[dict[str, Any]], Answer]
    packages: Sequence[str]
    extra: str
    has_windows: bool = True  # whether it computes the sliding windows of a network

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


def main(request_file: Path, result_file: Path, scores_file: Path) -> int:
    """Answer the request; 1 with `error: ...` on stderr if the program cannot read the export."""
    request = json.loads(request_file.read_text(encoding="utf-8"))
    try:
        result, scores = READERS[request["reader"]].read(request)
    except Exception as error:  # any fault of the program: parity.py reports it
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    save_file(dict(scores), scores_file)
    result_file.write_text(json.dumps(result), encoding="utf-8")
    return 0


def by_transformers(request: dict[str, Any]) -> Answer:
    """A merged model, or an adapter that peft puts on its base, in the arithmetic of the request."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    dtype = getattr(torch, request["arithmetic"])
    folder, program = request["folder"], f"transformers {transformers.__version__}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base = request["base"] if request["is_adapter"] else folder
    is_wrapped = hasattr(transformers.AutoConfig.from_pretrained(base), "text_config")
    kind = transformers.AutoModelForImageTextToText if is_wrapped else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(base, dtype=dtype)
    if request["is_adapter"]:
        import peft

        model = peft.PeftModel.from_pretrained(model, folder)
        program = f"peft {peft.__version__}, {program}"
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model = model.eval()
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    prompts = []
    for prompt in request["prompts"]:
        text = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
        prompts.append({"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]})
    scored: list[Score] = []
    first = None
    with torch.inference_mode():
        for done, (ids, positions) in enumerate(request["texts"], 1):
            before = [position - 1 for position in positions]
            logits = model(torch.tensor([ids[:-1]])).logits[0, before].float()
            rows = logits.log_softmax(-1)
            first = rows[0].numpy() if first is None else first
            of_tokens = rows.gather(1, torch.tensor([[ids[position]] for position in positions]))[:, 0]
            best = rows.max(-1)
            scored += zip(of_tokens.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
            _report(done, len(request["texts"]))
    stops = {str(token): token in ends for token in request["stop_ids"]}
    assert first is not None
    return {"program": program, "prompts": prompts, "stops": stops}, _arrays(scored, first)


def by_llama_cpp(request: dict[str, Any]) -> Answer:
    """A GGUF file, or an adapter on the GGUF file of its base."""
    folder = Path(request["folder"])
    if request["is_adapter"]:
        path, lora = Path(request["base"]), folder / f"{request['name']}-lora.gguf"
    else:
        path, lora = next(folder.glob("*.gguf")), None
    asked, most = request["ask"]
    longest = max(len(ids) for ids, _ in request["texts"])
    longest = max(longest + _TIMED, *(len(ids) + most for ids in asked), 0)
    program = Server(path, lora, longest, request["threads"], request.get("template"))
    prompts = []
    for prompt in request["prompts"]:
        text = program.render(prompt["messages"])
        ids, bos = program.tokenize(text), request["bos"]
        if ids[:1] == [request["bos_id"]] and not text.startswith(bos):
            text = bos + text  # the program removes the text of BOS, and adds its token
        prompts.append({"text": text, "ids": ids})
    stops = {str(token): program.ends(token) for token in request["stop_ids"]}
    ids, positions = request["texts"][0]
    first = program.log_probabilities(ids[: positions[0]])
    scored: list[Score] = []
    total = sum(len(positions) for _, positions in request["texts"])
    for ids, positions in request["texts"]:
        for position in positions:
            scored.append(program.score(ids[:position], ids[position]))
            _report(len(scored), total)
    result: dict[str, Any] = {"program": program.name, "prompts": prompts, "stops": stops}
    if most:
        result["answers"] = [program.generate(ids, most)[0] for ids in asked]
        ids = request["prompts"][0]["ids"]
        result["tokens_per_second"] = program.generate(ids, _TIMED, to_the_end=True)[1]
    return result, _arrays(scored, first)


def _arrays(scored: Sequence[Score], first: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    own, best, best_scored = zip(*scored, strict=True)
    return {
        "scored": np.array(own, np.float32),
        "best": np.array(best, np.int64),
        "best_scored": np.array(best_scored, np.float32),
        "first": first,
    }


def _report(done: int, total: int) -> None:
    print(f"progress {done} {total}", flush=True)


READERS: dict[str, Reader] = {
    "transformers": Reader(by_transformers, ["transformers"], "verify"),
    "peft": Reader(by_transformers, ["transformers", "peft"], "verify"),
    "llama.cpp": Reader(by_llama_cpp, ["xllamacpp"], "gguf", has_windows=False),
}

if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
