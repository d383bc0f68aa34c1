"""A process of its own that reads an export back with the program that people will use, and says what it makes of it.

`python -m lorafit.export.readback REQUEST RESULT LOGITS`: REQUEST and RESULT are JSON (see `parity.py`), LOGITS is an
array of numpy, (positions, vocab_size) float32: for each prompt the last of its tokens and those of the answer. This is
the one place that imports transformers, peft or llama.cpp.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.export import llama_cpp

Answer = tuple[dict[str, Any], NDArray[np.float32]]


def main(request_file: Path, result_file: Path, logits_file: Path) -> None:
    """Answer the request; `missing` in the result names what would have to be installed, `error` what failed."""
    request = json.loads(request_file.read_text(encoding="utf-8"))
    kind = request["kind"]
    needed = {"merged": ["transformers"], "adapter": ["transformers", "peft"]}.get(kind, [])
    lacking = [module for module in needed if not find_spec(module)]
    if kind in ("gguf", "gguf-lora") and llama_cpp.installed() is None:
        lacking = ["llama.cpp"]
    if lacking:
        result_file.write_text(json.dumps({"missing": lacking}), encoding="utf-8")
        return
    try:
        result, logits = _by_transformers(request) if needed else _by_llama_cpp(request)
    except Exception as error:  # whatever the program says to the file: the other process tells it
        result_file.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}), encoding="utf-8")
        return
    np.save(logits_file, logits)
    result_file.write_text(json.dumps(result), encoding="utf-8")


def _by_transformers(request: dict[str, Any]) -> Answer:
    """A merged model, or an adapter that peft puts on its base, in the arithmetic that is asked for."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(request["threads"])
    dtype = getattr(torch, request["arithmetic"])
    folder, program = request["folder"], f"transformers {transformers.__version__}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if request["kind"] == "merged":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        import peft

        base = transformers.AutoModelForCausalLM.from_pretrained(request["base"], dtype=dtype)
        model = peft.PeftModel.from_pretrained(base, folder)
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
            given = torch.tensor([prompt["ids"]])
            made = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                max_new_tokens=request["max_tokens"],
                max_length=None,
            )
            prompts.append({"text": text, "ids": ids, "greedy": made[0, given.shape[1] :].tolist()})
            whole = torch.tensor([[*prompt["ids"], *prompt["answer"]]])
            rows.append(model(whole).logits[0, len(prompt["ids"]) - 1 :].float().numpy())
    stops = {str(token): token in ends for token in request["stop_ids"]}
    return {"program": program, "prompts": prompts, "stops": stops}, np.concatenate(rows)


def _by_llama_cpp(request: dict[str, Any]) -> Answer:
    """A GGUF file, or an adapter on the GGUF file of its base."""
    module = llama_cpp.installed()
    assert module is not None
    longest = max(len(prompt["ids"]) for prompt in request["prompts"]) + request["max_tokens"]
    path, lora = Path(request["folder"]) / request["file"], None
    if request["kind"] == "gguf-lora":
        path, lora = Path(request["base"]), path
    program = llama_cpp.open_program(module, path, lora, longest, request["threads"])
    prompts, rows = [], []
    for prompt in request["prompts"]:
        text = program.render(prompt["messages"])
        ids, bos = program.tokenize(text), request["bos"]
        if ids[:1] == [request["bos_id"]] and not text.startswith(bos):
            text = bos + text  # the program took it away, to put the token there itself
        given, answer = prompt["ids"], prompt["answer"]
        after = [program.logits([*given, *answer[:made]]) for made in range(len(answer) + 1)]
        greedy = _greedy(program, given, answer, after, request["max_tokens"])
        prompts.append({"text": text, "ids": ids, "greedy": greedy})
        rows += after
    stops = {str(token): program.ends(token) for token in request["stop_ids"]}
    return {"program": program.name, "prompts": prompts, "stops": stops}, np.array(rows)


def _greedy(
    program: llama_cpp.Program,
    ids: Sequence[int],
    answer: Sequence[int],
    after: Sequence[NDArray[np.float32]],
    max_tokens: int,
) -> list[int]:
    """The likeliest tokens one by one, up to and with the one that the program stops at.

    `after` are the logits after `ids` and each token of `answer`: as far as the two agree, they are known.
    """
    made: list[int] = []
    while len(made) < max_tokens and not (made and program.ends(made[-1])):
        is_known = made == list(answer[: len(made)]) and len(made) < len(after)
        logits = after[len(made)] if is_known else program.logits([*ids, *made])
        made.append(int(logits.argmax()))
    return made


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
