"""The types that keys of a run have beside pydantic's own: names of devices, intervals, `auto`, resumable keys."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue
from pydantic.annotated_handlers import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema


def _as_tuple(value: object) -> object:
    """A single string as a list of one."""
    return (value,) if isinstance(value, str) else value


def as_mapping(value: object) -> object:
    """`{key:value}` without a blank, which YAML reads as a key without a value, as a mapping too."""
    if not isinstance(value, dict):
        return value
    pairs = (
        key.split(":", 1) if value[key] is None and ":" in str(key) else (key, value[key]) for key in value
    )
    return dict(pairs)


def _interval(value: object) -> object:
    """A whole number of steps, or the word `epoch` (which is stored as 0)."""
    return 0 if value == "epoch" else value


def device_name(text: str) -> str:
    """The name of a device as lorafit writes it. Raises ValueError for one that is not known."""
    name = text.strip().lower()
    if not re.fullmatch(r"auto|cpu|gpu|mps|cuda(:[0-9]{1,3})?", name):
        raise ValueError("a device is auto, cpu, gpu, cuda, cuda:N or mps")
    return name


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


def _encoding(name: str) -> str:
    """The name of an encoding of text that Python knows."""
    try:
        "".encode(name)
    except LookupError:  # also for a codec that is not for text
        raise ValueError(
            "no encoding of text has this name; `utf-8`, `utf-16` and `cp949` are some"
        ) from None
    return name


_UNITS = {"d": 86400.0, "h": 3600.0, "min": 60.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(d|h|min|m|s)\s*")
_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")


def budget_seconds(text: str) -> float | None:
    """The seconds in a duration such as `1h30m`, `20min` or `90s`; None for a clock time such as `18:00`.

    Raises ValueError for any other text.
    """
    parts = _DURATION.findall(text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if _CLOCK.fullmatch(text):
        return None
    if not parts or _DURATION.sub("", text):
        raise ValueError("a time budget is a duration (`20min`, `1h30m`, seconds) or a clock time (`18:00`)")
    if not 0 < seconds <= 365 * _UNITS["d"]:
        raise ValueError("a time budget is more than 0 seconds and at most 365 days")
    return seconds


def next_clock_time(text: str, now: datetime) -> datetime:
    """The first moment after `now` at which a clock shows `text`."""
    hour, minute = map(int, text.split(":"))
    at = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return at if at > now else at + timedelta(days=1)


def _time_budget(value: object) -> object:
    """A duration or a clock time as its text; a number is one of seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value:.9g}s"
    if isinstance(value, str):
        value = value.strip()
        budget_seconds(value)
    return value


TimeBudget = Annotated[str, BeforeValidator(_time_budget)]
Encoding = Annotated[str, AfterValidator(_encoding)]
Interval = Annotated[int, BeforeValidator(_interval), Field(ge=0)]
AUTO: Any = (
    -1
)  # `auto` in place of a number: config/auto.py computes the number from the sizes of model and data


class OrAuto:
    """Marks a number that can also be the word `auto`, which is stored as AUTO."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema of the number, or the word."""
        return core_schema.no_info_wrap_validator_function(
            lambda value, number: AUTO if value == "auto" else number(value),
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: "auto" if value == AUTO else value
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The JSON Schema of the number, or the word."""
        return {"anyOf": [handler(schema), {"const": "auto"}]}


KEEPS_RESULTS: dict[str, JsonValue] = {"changes_results": False}


def resumable(default: Any = ..., **options: Any) -> Any:
    """A key or section that may change when a run is resumed: it decides memory, speed or places, or digests of model
    and rows cover it. A checkpoint is compared with every other key.
    """
    return Field(default, json_schema_extra=KEEPS_RESULTS, **options)


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)
