"""The time of a lorafit training step by groups of operators.

    python benchmarks/profile.py MODEL_FOLDER ROWS [RECIPE] [section.key=value ...] [--steps 2] [--json FILE]

Runs real steps (packs of the rows in file order, loss, backward, clipping, AdamW) under torch.profiler and adds the own
time of each operator to a group. The profiler makes a step slightly slower: the shares are more exact than the
milliseconds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafit.config.schema import Config

# The first match counts: an enclosing range or function, then the name of the operator.
_ENCLOSING = {
    "data": r"^lorafit data$",
    "optimizer": r"^lorafit (optimizer|clip)$",
    "attention": r"attention|Attention",
}
_OPERATOR = {
    "matrix products": r"^(aten|mkldnn|onednn)::_?(mm|addmm|bmm|baddbmm|int_mm|matmul|linear)|mkldnn.*linear|gemm"
    r"|linear_pointwise",
    "compiled kernels": r"cpp_fused|triton|extern_kernels|Torch-Compiled|CompiledFunction|^## Call"
    r"|^_(Project|Norm)(Backward)?$",  # time outside torch's operators: model/native, also int8 products
    "copies and casts": r"^aten::(copy_|_to_copy|clone|contiguous|cat|index|_index_put_impl_|index_select|embedding"
    r"|gather)$",
    "zero-fill": r"^aten::(zero_|fill_|zeros|zeros_like|full|full_like)$",
}
_LOSS = r"CrossEntropy|cross_entropy|nll_loss|log_softmax"
_ELEMENTWISE = (
    r"^aten::(add|sub|mul|div|neg|silu|rsqrt|pow|mean|sum|square|exp|sigmoid|amax|abs|round|clamp|where"
    r"|bernoulli_|_foreach)"
)
GROUPS = (
    *("matrix products", "attention", "compiled kernels", "elementwise", "loss without its products"),
    *("copies and casts", "zero-fill", "optimizer", "data", "other operators", "outside operators"),
)


def group_of(name: str, enclosing: Iterable[str]) -> str:
    """The group of the operator `name` inside the ranges and functions `enclosing`."""
    outer = [name, *enclosing]
    for group, pattern in _ENCLOSING.items():
        if any(re.search(pattern, each) for each in outer):
            return group
    if re.search(_OPERATOR["matrix products"], name):
        return "matrix products"
    if any(re.search(_LOSS, each) for each in outer):
        return "loss without its products"
    for group, pattern in _OPERATOR.items():
        if re.search(pattern, name):
            return group
    return "elementwise" if re.search(_ELEMENTWISE, name) else "other operators"


def profile(config: Config, model: Path, num_steps: int) -> dict[str, Any]:
    """Milliseconds per step by group, after one warm-up step, and the largest operators of `other operators`."""
    import torch
    from torch._inductor import config as inductor
    from torch.nn.utils import clip_grad_norm_
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiler

    from lorafit.config.auto import without_auto
    from lorafit.data.build import build_data, sizes_of
    from lorafit.data.packing import Packer
    from lorafit.forward import pack_loss
    from lorafit.hub.client import ModelFolder
    from lorafit.model.adamw import AdamW
    from lorafit.model.architecture import read_architecture
    from lorafit.model.build import build
    from lorafit.model.device import pick_device

    inductor.cpp.enable_kernel_profile = True  # otherwise fused kernels have no names
    data = config.data.model_copy(update={"holdout": 0.0})
    arch = read_architecture(model)
    built = build_data(
        config.model_copy(update={"data": data}), ModelFolder(model, model.name, None), arch, True
    )
    rows = built.training
    config = without_auto(config, sizes_of(built, arch.num_parameters))
    network = build(config, model, pick_device(config.model.device)).network.train()
    adapter_parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = AdamW(adapter_parameters, config.train.weight_decay)
    tokens = 0

    def step(number: int) -> None:
        nonlocal tokens
        size = config.train.batch_size
        with record_function("lorafit data"):
            chosen = [rows.row(index % len(rows)) for index in range(number * size, (number + 1) * size)]
            packs = Packer(config.train.micro_batch_tokens, config.data.packing).packs(chosen)
        supervised = sum(len(pack.targets) for pack in packs)
        for pack in packs:
            (pack_loss(network, pack) / supervised).backward()
        with record_function("lorafit clip"):
            clip_grad_norm_(adapter_parameters, config.train.max_grad_norm)
        with record_function("lorafit optimizer"):
            optimizer.step(config.train.learning_rate)
        optimizer.zero_grad()
        tokens += sum(pack.num_tokens for pack in packs) if number else 0

    step(0)
    with profiler(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        for number in range(1, num_steps + 1):
            step(number)
        seconds = time.perf_counter() - started
    spent, others = _sort(profiled.events(), seconds)
    return {
        "tokens": tokens / num_steps,
        "milliseconds": {group: 1000 * taken / num_steps for group, taken in spent.items()},
        "total_milliseconds": 1000 * seconds / num_steps,
        "largest_others": {
            name: round(1000 * taken / num_steps, 1)
            for name, taken in sorted(others.items(), key=lambda item: -item[1])[:8]
        },
        "threads": torch.get_num_threads(),
        "dtype": str(network.model.norm.weight.dtype).removeprefix("torch."),
    }


def _sort(events: Iterable[Any], seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by group, and by name within `other operators`; `outside operators` is the remaining time."""
    spent = dict.fromkeys(GROUPS, 0.0)
    others: dict[str, float] = {}
    for event in events:
        own_seconds = event.self_cpu_time_total / 1e6
        enclosing, parent = [], event.cpu_parent
        while parent is not None:
            enclosing.append(parent.name)
            parent = parent.cpu_parent
        group = group_of(event.name, enclosing)
        spent[group] += own_seconds
        if group == "other operators":
            others[event.name] = others.get(event.name, 0.0) + own_seconds
    spent["outside operators"] = max(0.0, seconds - sum(spent.values()))
    return spent, others


def table(result: Mapping[str, Any]) -> str:
    """The groups as lines, with milliseconds per step and shares."""
    total = result["total_milliseconds"]
    lines = [
        f"{'step of ' + format(result['tokens'], '.0f') + ' tokens, ' + result['dtype']:<34}{'ms':>9}{'%':>7}"
    ]
    for group, taken in [*result["milliseconds"].items(), ("total", total)]:
        lines.append(f"{group:<34}{taken:>9.1f}{100 * taken / total:>7.1f}")
    return "\n".join(lines)


def main() -> None:
    from lorafit.config.load import load_config, recipe_file

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("settings", nargs="*", metavar="[RECIPE] [section.key=value ...]")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    recipes = [recipe_file(word) for word in arguments.settings if "=" not in word]
    overrides = [word for word in arguments.settings if "=" in word]
    paths = [f"model.name={arguments.model}", f"data.path={arguments.rows}"]
    config = load_config(recipes[0] if recipes else None, [*overrides, *paths])
    result = profile(config, arguments.model, arguments.steps)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
elif __name__ == "profile":
    # Another script of this folder runs, so the folder is first on sys.path. torch imports the standard library's
    # cProfile, which then imports this file as the module `profile`. Replace it by the standard module.
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    spec = PathFinder.find_spec("profile", [str(Path(json.__file__).parents[1])])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
