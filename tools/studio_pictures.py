"""Make the pictures of docs/studio.md from a folder with the demo run: `python tools/studio_pictures.py RUNS`.

Needs playwright and chromium (LORAFIT_CHROMIUM names one that is not on the PATH). The pictures go to docs/pictures.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from lorafit.studio.server import run_studio

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"


def main(folder: Path) -> None:
    """Take one picture per page, 1100 pixels wide."""
    shown: list[str] = []
    threading.Thread(target=run_studio, args=(folder, 0), kwargs={"show": shown.append}, daemon=True).start()
    while not shown:
        time.sleep(0.05)
    base = shown[0].partition("/open")[0]
    PICTURES.mkdir(exist_ok=True)
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = os.environ.get("LORAFIT_CHROMIUM") or next(filter(None, map(shutil.which, names)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(shown[0])
        page.wait_for_url(f"{base}/")
        run = page.locator("#run-table a").first.get_attribute("href")
        rows = "/data?data.path=demo/rows.json&model.name=demo/model#rows"
        for name, path, height in (("watch", f"{run}#state", 860), ("data", rows, 760)):
            page.set_viewport_size({"width": 1100, "height": height})
            page.goto(f"{base}{path}")
            page.locator(".tile, article").first.wait_for()
            page.evaluate("document.querySelector(location.hash).scrollIntoView()")
            page.screenshot(path=PICTURES / f"studio-{name}.png")
        browser.close()


if __name__ == "__main__":
    runs = Path(sys.argv[1]).resolve()
    os.chdir(ROOT)  # the pictures show no folder of this machine
    main(runs)
