"""`lorafit studio`: local pages to look at rows, and to start, watch, compare and ask runs."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Annotated

import typer


def studio(
    folder: Annotated[Path, typer.Argument(help="Folder that contains runs, or will.")] = Path("runs"),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8765,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the address only, and open no browser.")
    ] = False,
) -> None:
    """Open a local page to look at rows, and to start, watch, compare and ask runs.

    lorafit studio

    lorafit studio runs --port 0 --no-browser
    """
    from lorafit.errors import ConfigError

    try:
        from lorafit.studio.server import run_studio
    except ImportError as error:
        raise ConfigError(f"`{error.name}` is missing", hint="pip install 'lorafit[studio]'") from None
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`{folder}` is no folder", hint="give the folder that contains the runs")
    run_studio(folder, port, show=(lambda url: None) if no_browser else _open)


def _open(url: str) -> None:
    """Open `url` in a browser with a window: one in the terminal would take the terminal from the studio."""
    import webbrowser

    with contextlib.suppress(webbrowser.Error):
        browser = webbrowser.get()
        if os.environ.get("BROWSER") or type(browser) is not webbrowser.GenericBrowser:
            threading.Thread(target=browser.open, args=(url,), daemon=True).start()
