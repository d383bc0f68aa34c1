"""Compares reading and answering with llama.cpp: the same weights, threads and prompts, in turn.

    python -m benchmarks.llama_cpp [--model DIR | --layers 22] [--work DIR] [--quick] [--json FILE]

llama.cpp runs as its own server in another process (package xllamacpp), lorafit as its engine. The GGUF files, in f16
and q8_0, are written by lorafit's export from the base in DIR, or from TinyLlama's shape with random weights. lorafit
holds the same base in bfloat16 and int8. Prompts are random ids, decoding is greedy.

Reading is a prompt of 512 tokens and one answer token. The first token is the time of a prompt of 64 tokens and one
answer token. Decoding is the time of the tokens after the first, for one and more answers at a time. Figures are the
best of the turns: another program can only make them worse. The share of the memory is the bytes of all weights that a
token reads, times the tokens of one stream per second, divided by the measured rate at which all threads read.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import random
import secrets
import shlex
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

# For a start as a file: makes `benchmarks.x` importable, and keeps profile.py from hiding the standard module.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.generation import Generate, Prompts, ours
from benchmarks.programs import THREADS
from benchmarks.report import table
from benchmarks.speed import _without_paths, machine, random_model, shared_folder, versions

THEIRS, OURS = "llama.cpp", "lorafit"
KINDS = {"16 bits": ("f16", "none"), "8 bits": ("q8_0", "int8")}  # llama.cpp's type, lorafit's quantization
STREAMS = (1, 4, 16)
READ, FIRST = 512, 64  # tokens of the prompts


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a call: `streams` prompts of `prompt` tokens each, answered with `tokens` each."""

    kind: str
    program: str
    streams: int
    prompt: int
    tokens: int
    seconds: float


class LlamaCpp:
    """llama.cpp's server with its own defaults for a cache and attention, on the loopback interface.

    It has a process of its own: in one process, the threads of both programs would wait for each other in other ways
    than alone.
    """

    def __init__(self, path: Path, context: int) -> None:
        self._key = secrets.token_hex(16)
        processes = multiprocessing.get_context("spawn")
        self._pipe, theirs = processes.Pipe()
        self._process = processes.Process(
            target=_serve, args=(theirs, str(path), context, self._key), daemon=True
        )
        self._process.start()
        theirs.close()
        self._address: str = self._pipe.recv()
        self._threads = ThreadPoolExecutor(max(STREAMS))

    def close(self) -> None:
        """End the server."""
        self._pipe.close()
        self._process.join()

    def __call__(self, prompts: Prompts, tokens: int) -> list[list[int]]:
        """The greedy answers of `tokens` tokens each."""
        return list(self._threads.map(lambda prompt: self._answer(prompt, tokens), prompts))

    def _answer(self, prompt: Sequence[int], tokens: int) -> list[int]:
        settings = {"temperature": 0, "samplers": ["temperature"], "ignore_eos": True, "return_tokens": True}
        body = json.dumps({"prompt": list(prompt), "n_predict": tokens, "cache_prompt": False, **settings})
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._address + "/completion", body.encode(), headers)
        with urllib.request.urlopen(request) as response:
            return [int(token) for token in json.loads(response.read())["tokens"]]


def _serve(pipe: Connection, path: str, context: int, key: str) -> None:
    """Runs the server, sends its address, and ends with the pipe."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.api_keys = [key]
    params.n_parallel = max(STREAMS)
    params.n_ctx = context * max(STREAMS)
    params.n_gpu_layers = 0
    params.fit_params = False
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    server = xllamacpp.Server(params)
    pipe.send(server.listening_address)
    with contextlib.suppress(EOFError):
        pipe.recv()


def write_file(model: Path, kind: str, work: Path) -> Path:
    """The base in `model` as a GGUF file, by lorafit's export; what is there is used again."""
    from lorafit.export.gguf_model import write_gguf
    from lorafit.export.run_source import open_source
    from lorafit.model.adapter_file import adapter_files, adapter_tensors
    from lorafit.model.build import build_saved
    from lorafit.model.lora import LoraSpec, attach

    path = work / f"{model.name}-{kind}.gguf"
    if path.exists():
        return path
    adapter = work / f"{model.name}-adapter"
    if not adapter.exists():  # an export needs one; it is not merged
        network, _ = build_saved(model, None, "cpu", "bfloat16")
        spec = attach(network, LoraSpec(1, 1.0, 0.0, ("q_proj",), False), seed=0)
        adapter.mkdir()
        for name, content in adapter_files(
            adapter_tensors(network), spec, str(model.resolve()), None
        ).items():
            (adapter / name).write_bytes(content)
    write_gguf(open_source(adapter, offline=True), path, kind, lambda *_: None, merged=False)
    return path


def measure_kind(
    model: Path, kind: str, work: Path, tokens: int, turns: int
) -> tuple[list[Timing], dict[str, int]]:
    """All timings of one number of bits, and the bytes of the weights that a token reads, by program."""
    import torch

    from lorafit.model.build import build_saved

    torch.set_num_threads(THREADS)
    file_type, quantize = KINDS[kind]
    path = write_file(model, file_type, work)
    network = build_saved(model, None, "cpu", "bfloat16", quantize=quantize)[0].eval()
    arch, order = network.arch, random.Random(0)
    server = LlamaCpp(path, READ + tokens)
    programs: dict[str, Generate] = {THEIRS: server, OURS: ours(network)}
    held = sum(part.nbytes for part in (*network.parameters(), *network.buffers()))
    table_bytes = network.decoder.embed_tokens.weight.nbytes
    untied = 0 if arch.tie_word_embeddings else 1
    head = arch.vocab_size * arch.hidden_size
    in_file = path.stat().st_size - untied * head * (2 if kind == "16 bits" else 34 / 32)
    read = {THEIRS: int(in_file), OURS: held - untied * table_bytes}

    def prompts(count: int, length: int) -> Prompts:
        return [[order.randrange(3, arch.vocab_size) for _ in range(length)] for _ in range(count)]

    timings = []
    cases = [(1, READ, 1), *((streams, FIRST, most) for streams in STREAMS for most in (1, tokens))]
    for generate in programs.values():
        generate(prompts(2, FIRST), 4)
    for turn in range(turns):
        for streams, length, most in cases:
            given = prompts(streams, length)
            for program in list(programs)[:: -1 if turn % 2 else 1]:
                time.sleep(0.3)  # waiting threads of the other program fall asleep
                started = time.perf_counter()
                answers = programs[program](given, most)
                seconds = time.perf_counter() - started
                assert [len(answer) for answer in answers] == [most] * streams
                timings.append(Timing(kind, program, streams, length, most, seconds))
        print(f"{kind}: turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
    server.close()
    return timings, read


def memory_rate() -> float:
    """Bytes per second at which all threads read memory, the best of ten sums of 512 MB."""
    import torch

    torch.set_num_threads(THREADS)
    numbers = torch.ones(2**27)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - started)
    return numbers.nbytes / min(seconds)


def report(
    timings: Sequence[Timing], read: dict[str, dict[str, int]], rate: float, tokens: int, about: str
) -> str:
    """The figures as Markdown."""

    def best(kind: str, program: str, streams: int, prompt: int, most: int) -> float:
        key = (kind, program, streams, prompt, most)
        return min(t.seconds for t in timings if (t.kind, t.program, t.streams, t.prompt, t.tokens) == key)

    def decoding(kind: str, program: str, streams: int) -> float:
        after_first = best(kind, program, streams, FIRST, tokens) - best(kind, program, streams, FIRST, 1)
        return streams * (tokens - 1) / after_first

    rows = []
    for kind, num_bytes in read.items():
        decoded = {p: {n: decoding(kind, p, n) for n in STREAMS} for p in (THEIRS, OURS)}
        for name, digits, theirs, mine in [
            (f"read {READ} tokens, tokens/s", 0, *(READ / best(kind, p, 1, READ, 1) for p in decoded)),
            (f"first token after {FIRST}, ms", 0, *(1000 * best(kind, p, 1, FIRST, 1) for p in decoded)),
            *((f"{n} at a time, tokens/s", 1, *(decoded[p][n] for p in decoded)) for n in STREAMS),
            ("share of the memory", 2, *(num_bytes[p] * decoded[p][1] / rate for p in decoded)),
        ]:
            times = theirs / mine if name.startswith("first") else mine / theirs
            rows.append([f"{kind}: {name}", f"{theirs:.{digits}f}", f"{mine:.{digits}f}", f"{times:.2f}x"])
    return "\n\n".join([about, table(["", THEIRS, OURS, "lorafit is faster"], rows), ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="model folder (default: TinyLlama's shape, random weights)"
    )
    parser.add_argument("--layers", type=int, default=22, help="layers of the model with random weights")
    parser.add_argument("--work", type=Path, help="folder for the files; it is kept for the next run")
    parser.add_argument("--quick", action="store_true", help="two short turns")
    parser.add_argument("--json", type=Path, help="write all raw figures to this file")
    arguments = parser.parse_args()
    tokens, turns = (24, 2) if arguments.quick else (64, 5)
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        model = arguments.model or random_model(shared_folder(), work, arguments.layers)
        timings: list[Timing] = []
        read = {}
        rate = memory_rate()
        for kind in KINDS:
            more, read[kind] = measure_kind(model, kind, work, tokens, turns)
            timings += more
        rate = max(rate, memory_rate())
    command = shlex.join(["python", "-m", "benchmarks.llama_cpp", *_without_paths(sys.argv[1:])])
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "memory_rate": rate,
        "read": read,
    }
    if arguments.json:
        everything = {**record, "timings": [asdict(timing) for timing in timings]}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    about = (
        f"{record['date']}, {machine()['cpu']}, {THREADS} threads; {model.name}; the memory is read at "
        f"{rate / 1e9:.1f} GB/s; xllamacpp {version('xllamacpp')}, torch {versions()['torch']}. `{command}`"
    )
    print(report(timings, read, rate, tokens, about), end="")


if __name__ == "__main__":
    main()
