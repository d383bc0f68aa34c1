"""`lorafit export RUN adapter --check-for vllm`: whether a server loads all of an adapter, by a table of its rules.

The rules are those of the servers' sources, which docs/export.md names. The servers themselves are not started.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafit.errors import ConfigError, Problem, RunError, several
from lorafit.export.run_source import open_source
from lorafit.model.adapter_file import CONFIG, PREFIX
from lorafit.model.lora import VARIANTS
from lorafit.model.saved_adapter import SavedAdapter

_PAIR = ("lora_A", "lora_B")
_MERGE = "export `merged`, which every server loads"


@dataclass(frozen=True, slots=True)
class Server:
    """How a server reads adapters: it takes low-rank pairs of the layers' linears, with the one rank and alpha of the
    config.

    `ranks` are the values of its option `--max-lora-rank`, of which `rank` is the default; () if it takes any rank.
    `has_rslora`: it divides alpha by the root of the rank where the config says so, else always by the rank.
    `refuses_patterns`: ranks and alphas of single modules are an error, else they are ignored. `together` are pairs of
    linears: it fuses both, and loads no adapter with the first one alone.
    """

    title: str
    ranks: tuple[int, ...] = ()
    rank: int = 0
    has_rslora: bool = False
    refuses_patterns: bool = False
    together: tuple[tuple[str, str], ...] = ()


SERVERS = {
    "vllm": Server("vLLM", (1, 8, 16, 32, 64, 128, 256, 320, 512), 16, has_rslora=True),
    "sglang": Server(
        "SGLang",
        refuses_patterns=True,
        together=(
            ("q_proj", "v_proj"),
            ("k_proj", "q_proj"),
            ("v_proj", "q_proj"),
            ("up_proj", "gate_proj"),
            ("in_proj_qkv", "in_proj_z"),
            ("in_proj_z", "in_proj_qkv"),
            ("in_proj_a", "in_proj_b"),
            ("in_proj_b", "in_proj_a"),
        ),
    ),
}


def check_servers(run: str | Path, names: Sequence[str], *, offline: bool = False) -> list[str]:
    """One line per server that would load the whole adapter of `run`: how many modules, and with which option.

    Raises RunError with all that a server would refuse, leave out or compute otherwise, ConfigError for another name.
    """
    if unknown := [name for name in names if name not in SERVERS]:
        message = f"`{unknown[0]}` is no server whose rules are known"
        raise ConfigError(message, place="--check-for", hint=f"one of {', '.join(SERVERS)}")
    source = open_source(run, offline=offline)
    lines, problems = [], []
    for name in dict.fromkeys(names):
        server = SERVERS[name]
        faults = list(faults_of(source.saved, server))
        place = str(source.adapter / CONFIG)
        problems += [Problem(f"{server.title} {fault}", place, _MERGE) for fault in faults]
        count = len(source.saved.spec.targets)
        option = _option(source.saved, server)
        lines.append(f"{server.title} would load {count} of {count} modules{option}")
    if problems:
        raise RunError.of(problems)
    return lines


def faults_of(saved: SavedAdapter, server: Server) -> Iterator[str]:
    """What the server does with an adapter other than PEFT does, each after the server's name."""
    spec, total = saved.spec, len(saved.parts) + len(saved.whole)
    if not VARIANTS[spec.variant].is_plain:
        yield f"loads no adapters of the variant `{spec.variant}`"
        return
    if saved.tables:
        yield f"would load {total - len(saved.tables)} of {total} modules: not {several(saved.tables)}"
    if spec.rslora and not server.has_rslora:
        yield "divides alpha by the rank, and this adapter (rsLoRA) needs its root"
    largest = max((spec.of(module).rank for module in spec.targets), default=spec.rank)
    if server.ranks and largest > server.ranks[-1]:
        yield f"takes ranks up to {server.ranks[-1]}, and this adapter has rank {largest}"
    if own := [module for module in spec.targets if _differs(saved, module)]:
        if server.refuses_patterns:
            yield f"refuses `rank_pattern` and `alpha_pattern`, which {len(own)} of {total} modules have"
        else:
            yield f"would scale {len(own)} of {total} modules wrongly: it ignores `rank_pattern` and `alpha_pattern`"
    for name, other in server.together:
        if alone := [module for module in spec.targets if _is_alone(module, name, other, spec.targets)]:
            yield f"does not load `{name}` without `{other}`: {len(alone)} of {total} modules"
    if unknown := [module for module in spec.targets if not _is_known(module, saved.parts[module])]:
        yield f"would load {total - len(unknown)} of {total} modules: not {several(unknown)}"


def _differs(saved: SavedAdapter, module: str) -> bool:
    """Whether a module has another rank or scale than the config's one."""
    own = saved.spec.of(module)
    return (own.rank, own.scale) != (saved.spec.rank, saved.spec.scale)


def _is_alone(module: str, name: str, other: str, targets: Iterable[str]) -> bool:
    """Whether a module is a linear `name` of a layer that adapts no linear `other`."""
    return module.endswith(f".{name}") and f"{module.removesuffix(name)}{other}" not in targets


def _is_known(module: str, parts: Mapping[str, str]) -> bool:
    """Whether the names of a module's tensors are those that a server looks for: PEFT's own."""
    return {*parts.values()} == {f"{PREFIX}{module}.{part}.weight" for part in _PAIR}


def _option(saved: SavedAdapter, server: Server) -> str:
    """The option that a server must be started with for this rank; "" if it needs none."""
    if not server.ranks or saved.spec.rank <= server.rank:
        return ""
    return f", started with --max-lora-rank {next((r for r in server.ranks if r >= saved.spec.rank), '')}"
