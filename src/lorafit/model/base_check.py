"""Whether an adapter was made on the base model that it is put on: by the base's bytes, else by its name."""

from __future__ import annotations

import re
from pathlib import Path

from lorafit.errors import LorafitError, ModelError
from lorafit.hub.client import model_folder
from lorafit.hub.dataset_splits import HUB_ID
from lorafit.model.adapter_file import CONFIG
from lorafit.model.saved_adapter import MAX_CONFIG
from lorafit.model.weights import fingerprint, is_fingerprint_of
from lorafit.storage.atomic import MANIFEST, read_facts
from lorafit.storage.safe_read import read_json

_4_BIT = re.compile(r"(-unsloth)?-bnb-4bit$", re.IGNORECASE)


def check_base(adapter: Path, base: Path, name: str, *, accepted: bool = False, flag: str = "") -> str:
    """Compare the base model in `base`, which the user calls `name`, with the one that `adapter` was made on.

    The manifest of an adapter of lorafit has the fingerprint of its base, and goes where its folder goes. Another
    adapter names its base: that one is compared if it is on this machine, else the names are.

    Returns a line for the user, "" if the base is the adapter's own: that it is another one, and was `accepted`, or
    that it cannot be known. Raises ModelError for another one; `flag` is what accepts it.
    """
    named, revision = named_base(adapter)
    facts = read_facts(adapter) if (adapter / MANIFEST).is_file() else {}
    made_on = facts.get("base_model")
    if made_on is None:
        if _is_place(named, revision, base, name):
            return ""
        made_on = _fingerprint_of(named, revision)
    if made_on is not None:
        if is_fingerprint_of(made_on, base):
            return ""
        bases = f"`{named}` ({made_on[:12]}), and not `{name}` ({fingerprint(base)[:12]})"
    elif _differ(named, name):
        bases = f"`{named}`, and not `{name}`"
    else:
        names = f"it names `{named}`, which cannot be compared here" if named else "it does not name its base"
        return f"whether the adapter {adapter} was made on {name} is not known: {names}"
    message = f"the adapter was made on another base model: {bases}"
    if accepted:
        return f"{message} ({adapter})"
    otherwise = f", or accept this one with {flag}: its answers may be of no use" if flag else ""
    raise ModelError(message, place=str(adapter), hint=f"give the base model of its training{otherwise}")


def named_base(adapter: Path) -> tuple[str, str | None]:
    """(name, revision) of the base model that an adapter's config names; "" where it names none."""
    try:
        raw = read_json(adapter / CONFIG, MAX_CONFIG)
        name, revision = raw["base_model_name_or_path"], raw.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", None
    return (name if isinstance(name, str) else ""), (revision if isinstance(revision, str) else None)


def original_name(name: str) -> str:
    """The hub id of the model of which `name` is a 4-bit copy, by the suffix that such copies have; else `name`."""
    return _4_BIT.sub("", name)


def _is_place(named: str, revision: str | None, base: Path, name: str) -> bool:
    """Whether an adapter's config names this base: its folder, or its hub id with no other revision."""
    if named and Path(named).expanduser().is_dir():
        return Path(named).expanduser().resolve() == base.resolve()
    is_hub_id = bool(HUB_ID.fullmatch(named)) and not Path(name).expanduser().exists()
    return is_hub_id and named.lower() == name.lower() and revision in (None, base.name)


def _fingerprint_of(named: str, revision: str | None) -> str | None:
    """The fingerprint of a base on this machine. None where it is not there, or is quantised: a copy of another one."""
    try:
        folder = model_folder(named, revision=revision, offline=True).path
        if read_json(folder / "config.json", MAX_CONFIG).get("quantization_config"):
            return None
        return fingerprint(folder)
    except (LorafitError, OSError, ValueError, AttributeError):
        return None


def _differ(named: str, name: str) -> bool:
    """Whether two hub ids are of different models. Mirrors have the same name under another owner."""
    if not all(HUB_ID.fullmatch(each) and not Path(each).expanduser().exists() for each in (named, name)):
        return False
    one, two = (original_name(each).rpartition("/")[2].lower() for each in (named, name))
    return one != two
