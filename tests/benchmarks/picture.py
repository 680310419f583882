"""Takes the README's picture of a report page, that of the quick start.

    kt fit digits
    python tests/benchmarks/picture.py saved_models/digits-*/report.html

It needs Chromium and Playwright, and writes .images/report.png.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parents[2] / ".images" / "report.png"


def main(page: Path) -> None:
    """Photographs the top of a page."""
    PICTURE.parent.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        view = browser.new_page(viewport={"width": 1180, "height": 1330})
        view.goto(page.resolve().as_uri())
        view.screenshot(path=PICTURE)
        browser.close()
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
