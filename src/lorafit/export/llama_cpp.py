"""llama.cpp, through the package `xllamacpp`: prompts, tokens, probabilities and end tokens of a GGUF file.

The package (extra `gguf`) is imported only in the process that reads an export back.
"""

from __future__ import annotations

import json
import secrets
import urllib.request
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FORCED = 1e4  # a bias of the logits that selects a token in any case
_SOME = 256  # tokens that a rare one is looked for in first
_BYTES_PER_THREAD = 1 << 30  # of weights

Score = tuple[float, int, float]  # log-probability of a token; the most probable one, its log-probability


def token_threads(weights: int, most: int) -> int:
    """The threads for a pass of one token over `weights` bytes, at most `most`.

    Threads that sleep while they wait for each other take longer over small weights than one thread alone.
    """
    return min(most, -(-weights // _BYTES_PER_THREAD))


class Server:
    """llama.cpp's server, inside this process, behind a random key on the loopback interface.

    It reads the GGUF file `path`, with the adapter `lora` on it, for texts of up to `length` tokens, on the CPU.
    A `template` replaces the file's own. Its
    HTTP interface: https://github.com/ggml-org/llama.cpp/tree/master/tools/server
    """

    def __init__(
        self, path: Path, lora: Path | None, length: int, threads: int, template: str | None = None
    ) -> None:
        import xllamacpp

        self.name = f"llama.cpp (xllamacpp {version('xllamacpp')})"
        self._key = secrets.token_hex(16)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.api_keys = [self._key]
        params.n_ctx = params.n_batch = params.n_ubatch = max(length + 8, 64)
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.fit_params = False
        params.warmup = False  # it takes longer than all that is asked
        params.cache_ram_mib = 0
        params.cpuparams_batch.n_threads = threads  # of a prompt
        params.cpuparams.n_threads = token_threads(path.stat().st_size, threads)
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if template is not None:
            params.chat_template = template
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self._server = xllamacpp.Server(params)
        self._size = int(self._ask("/v1/models")["data"][0]["meta"]["n_vocab"])
        self._letter = self.tokenize("a")[-1]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation, by the template in the file."""
        return str(self._ask("/apply-template", messages=messages)["prompt"])

    def tokenize(self, text: str) -> list[int]:
        """The ids of a rendered prompt, with the tokens that the program adds before it."""
        answer = self._ask("/tokenize", content=text, add_special=True, parse_special=True)
        return [int(token) for token in answer["tokens"]]

    def log_probabilities(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities of the token after `ids`, (vocab_size,). This is slow: the answer has megabytes."""
        return self._top(ids, self._size)

    def _top(self, ids: Sequence[int], most: int) -> NDArray[np.float32]:
        """The `most` highest log-probabilities, (vocab_size,); the others are -inf."""
        # The server omits the most probable token if that ends an answer or is a part of a character. The token that
        # it is forced to choose does not change the probabilities: it reports those from before the choice.
        answer = self._complete(ids, n_predict=1, n_probs=most, logit_bias=[[self._letter, _FORCED]])
        row = np.full(self._size, -np.inf, np.float32)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        return row

    def score(self, ids: Sequence[int], token: int) -> Score:
        """The score of `token` after `ids`."""
        answer = self._complete(ids, n_predict=1, n_probs=1, logit_bias=[[token, _FORCED]])
        if found := answer.get("completion_probabilities"):
            best = found[0]["top_logprobs"][0]
            return float(found[0]["logprob"]), int(best["id"]), float(best["logprob"])
        row = self._top(ids, _SOME)  # the server omits a part of a character
        if row[token] == -np.inf:
            row = self.log_probabilities(ids)
        return float(row[token]), int(row.argmax()), float(row.max())

    def generate(self, ids: Sequence[int], most: int, *, to_the_end: bool = False) -> tuple[list[int], float]:
        """(the greedy answer, tokens per second); `to_the_end`: of `most` tokens in any case."""
        answer = self._complete(ids, n_predict=most, return_tokens=True, ignore_eos=to_the_end)
        return [int(token) for token in answer["tokens"]], float(answer["timings"]["predicted_per_second"])

    def ends(self, token: int) -> bool:
        """Whether the program stops at this token."""
        answer = self._complete([token], n_predict=2, logit_bias=[[token, _FORCED]])
        return bool(answer["stop_type"] == "eos")

    def _complete(self, ids: Sequence[int], **settings: Any) -> dict[str, Any]:
        settings |= {"temperature": 0, "samplers": ["temperature"], "cache_prompt": True}
        return self._ask("/completion", prompt=list(ids), **settings)

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self._server.listening_address + path, data, headers)  # noqa: S310
        with urllib.request.urlopen(request) as response:  # noqa: S310 (http to this process)
            answer = json.loads(response.read())
        assert isinstance(answer, dict)
        return answer
