"""The model folder of a GGUF file: config.json and the tokenizer's files in the cache, with a link to the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
from pathlib import Path

import numpy as np

from lorafit.errors import ModelError
from lorafit.gguf_file.config import config_of, shortest
from lorafit.gguf_file.header import Header, read_header
from lorafit.gguf_file.tokenizer import tokenizer_files
from lorafit.storage.atomic import write_file
from lorafit.storage.cache_dir import cache_folder

WEIGHTS = "model.gguf"
_VERSION = 1  # of the conversion: another one makes the files again
_MAX_FACTORS = 4096


def gguf_model_folder(path: Path) -> Path:
    """The folder of the model in the GGUF file `path`, made if the file is new or has changed.

    Raises ModelError naming what cannot be used, ConfigError without the package `gguf`.
    """
    path = path.resolve()
    try:
        status = path.stat()
        state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, _VERSION)
        key = hashlib.sha256(f"{path} {state}".encode(errors="surrogateescape")).hexdigest()[:32]
        folder = cache_folder("gguf") / key
        if (folder / WEIGHTS).is_file():
            return folder
        header = read_header(path)
        files = {
            "config.json": config_of(header, lambda name: _numbers(header, name)),
            **tokenizer_files(header),
        }
        staging = folder.with_name(f".{key}.{secrets.token_hex(8)}")
        staging.mkdir(mode=0o700)
        try:
            for name, content in files.items():
                write_file(staging / name, json.dumps(content, ensure_ascii=False))
            (staging / WEIGHTS).symlink_to(path)
            with contextlib.suppress(OSError):  # another process was faster
                staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"it cannot be read: {error.strerror or error}", place=str(path)) from None
    return folder


def gguf_file_of(folder: Path) -> Path | None:
    """The GGUF file of which `folder` is the model folder; None for another folder."""
    return (folder / WEIGHTS).resolve() if (folder / WEIGHTS).is_symlink() else None


def _numbers(header: Header, name: str) -> list[float]:
    """The numbers of a small float32 tensor."""
    info = header.tensors[name]
    if info.type != "F32" or len(info.shape) != 1 or info.shape[0] > _MAX_FACTORS:
        raise ModelError(f"`{name}` is no short row of float32 numbers", place=str(header.path))
    numbers = np.fromfile(header.path, "<f4", info.shape[0], offset=info.start)
    return [shortest(float(number)) for number in numbers]
