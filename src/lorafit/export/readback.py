"""A process that reads an export back with the program that people will use, and answers fixed prompts with it.

`python -m lorafit.export.readback REQUEST RESULT LOGITS`: REQUEST and RESULT are JSON (see `parity.py`), LOGITS is a
safetensors file with (positions, vocab_size) float32: for each prompt its last token and those of the answer. Only
this module imports transformers, peft or llama.cpp.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lorafit.export.llama_cpp import Server

Answer = tuple[dict[str, Any], NDArray[np.float32]]


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


def main(request_file: Path, result_file: Path, logits_file: Path) -> int:
    """Answer the request; 1 with `error: ...` on stderr if the program cannot read the export."""
    request = json.loads(request_file.read_text(encoding="utf-8"))
    try:
        result, logits = READERS[request["reader"]].read(request)
    except Exception as error:  # any fault of the program: parity.py reports it
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    save_file({"logits": logits}, logits_file)
    result_file.write_text(json.dumps(result), encoding="utf-8")
    return 0


def by_transformers(request: dict[str, Any]) -> Answer:
    """A merged model, or an adapter that peft puts on its base, in the arithmetic of the request."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
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
    prompts, rows = [], []
    with torch.inference_mode():
        for prompt in request["prompts"]:
            text = tokenizer.apply_chat_template(
                prompt["messages"], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            inputs = torch.tensor([prompt["ids"]])
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                max_new_tokens=request["max_tokens"],
                max_length=None,
            )
            prompts.append({"text": text, "ids": ids, "greedy": output[0, inputs.shape[1] :].tolist()})
            whole = torch.tensor([[*prompt["ids"], *prompt["answer"]]])
            rows.append(model(whole).logits[0, len(prompt["ids"]) - 1 :].float().numpy())
    stops = {str(token): token in ends for token in request["stop_ids"]}
    return {"program": program, "prompts": prompts, "stops": stops}, np.concatenate(rows)


def by_llama_cpp(request: dict[str, Any]) -> Answer:
    """A GGUF file, or an adapter on the GGUF file of its base."""
    longest = max(len(prompt["ids"]) for prompt in request["prompts"]) + request["max_tokens"]
    path, lora = next(Path(request["folder"]).glob("*.gguf")), None
    if request["is_adapter"]:
        path, lora = Path(request["base"]), path
    program = Server(path, lora, longest, request["threads"])
    prompts, rows = [], []
    for prompt in request["prompts"]:
        text = program.render(prompt["messages"])
        ids, bos = program.tokenize(text), request["bos"]
        if ids[:1] == [request["bos_id"]] and not text.startswith(bos):
            text = bos + text  # the program removes the text of BOS, and adds its token
        before, answer, logits = prompt["ids"], prompt["answer"], cache(program.logits)
        rows += [logits((*before, *answer[:count])) for count in range(len(answer) + 1)]
        greedy: list[int] = []
        while len(greedy) < request["max_tokens"] and not (greedy and program.ends(greedy[-1])):
            greedy.append(int(logits((*before, *greedy)).argmax()))
        prompts.append({"text": text, "ids": ids, "greedy": greedy})
    stops = {str(token): program.ends(token) for token in request["stop_ids"]}
    return {"program": program.name, "prompts": prompts, "stops": stops}, np.array(rows)


READERS: dict[str, Reader] = {
    "transformers": Reader(by_transformers, ["transformers"], "verify"),
    "peft": Reader(by_transformers, ["transformers", "peft"], "verify"),
    "llama.cpp": Reader(by_llama_cpp, ["xllamacpp"], "gguf", has_windows=False),
}

if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
