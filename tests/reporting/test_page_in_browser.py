"""The report page in a real browser, at two widths, light and dark.

Run with `pytest -m browser`; needs Chromium and the extra [test].
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_pages import HOSTILE, made_page

from keras_transfer.reporting.page import render

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
NARROW, WIDE = 375, 1280
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
PAGES = {
    "hostile": lambda: made_page(),
    "multi": lambda: made_page(("cat", "dog", "a very long name " * 4), True),
    "many": lambda: made_page(
        tuple(f"species {i:03d}" for i in range(200)), False, 250
    ),
}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no Chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    api = pytest.importorskip("playwright.sync_api", reason="there is no Playwright")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*ARGUMENTS]
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, make in PAGES.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(render(make()), encoding="utf-8")
    return found


class Opened:
    """A page in the browser, with what it said and asked for."""

    def __init__(self, browser, file: Path, width: int = WIDE):
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda box: self.said.append(f"alert {box.message}"))
        self.page.on("request", lambda one: self.asked.append(one.url))
        self.page.goto(file.as_uri())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_it_fits_is_silent_and_can_be_used_by_everybody(browser, files, name, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with Opened(browser, files[name], width) as opened:
        page = opened.page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for details in page.locator("details").all():
            details.evaluate("one => one.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        schemes = ("light", "dark") if (name, width) != ("many", NARROW) else ()
        for scheme in schemes:  # of many classes at one width, which takes long enough
            page.emulate_media(color_scheme=scheme)
            faults = [
                (one["id"], one["nodes"][0]["html"][:200], one["nodes"][0]["any"][:1])
                for one in axe.run(page).response["violations"]
                if one["impact"] in ("serious", "critical")
            ]
            assert faults == []
        assert opened.said == []
        assert [x for x in opened.asked if not x.startswith(("file:", "data:"))] == []


def test_a_cell_shows_its_images_and_escape_closes_them(browser, files):
    with Opened(browser, files["hostile"]) as opened:
        page = opened.page
        cell = page.locator(".matrix button.wrong").first
        count = int(cell.inner_text())
        cell.click()
        dialog = page.locator("dialog")
        assert dialog.is_visible()
        assert dialog.locator("li").count() == count
        assert dialog.locator("img").count() > 0
        title = dialog.locator("h2").inner_text()
        assert any(name in title for name in HOSTILE)
        assert page.evaluate("document.activeElement.className") == "close"
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        assert page.evaluate("document.activeElement.dataset.set") == (
            cell.get_attribute("data-set")
        )
        assert opened.said == []


def test_the_keyboard_reaches_and_opens_everything(browser, files):
    with Opened(browser, files["hostile"]) as opened:
        page = opened.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.matches('button.cell')"):
                break
        page.keyboard.press("Enter")
        assert page.locator("dialog").is_visible()
        page.keyboard.press("Enter")  # the button that closes it
        assert not page.locator("dialog").is_visible()
        plot = page.locator(".plot")
        plot.focus()
        page.keyboard.press("ArrowRight")
        first = page.locator(".preview .path").inner_text()
        page.keyboard.press("ArrowRight")
        assert page.locator(".preview .path").inner_text() != first
        assert opened.said == []


def test_the_map_shows_the_image_under_the_pointer_in_both_projections(browser, files):
    with Opened(browser, files["hostile"]) as opened:
        page = opened.page
        for view in (0, 1):
            page.locator(f"input[name=view][value='{view}']").check()
            point = page.locator(f"[data-view='{view}'] [data-gid^=point-]").last
            point.scroll_into_view_if_needed()
            box = point.bounding_box()
            assert box is not None
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            assert page.locator(".preview .path").count() == 1
            assert page.locator(f"[data-view='{view}'] .spot").count() == 1
        assert opened.said == []


def test_heat_can_be_switched_on_and_the_page_prints(browser, files):
    with Opened(browser, files["hostile"]) as opened:
        page = opened.page
        heat = page.locator("img.heat").first
        opacity = "one => getComputedStyle(one).opacity"
        page.locator("#heat").focus()
        assert heat.evaluate(opacity) == "0"
        assert not page.locator(".key").is_visible()
        page.keyboard.press("Space")
        expect = pytest.importorskip("playwright.sync_api").expect
        expect(heat).to_have_css("opacity", "1")
        assert page.locator(".key").is_visible()
        page.emulate_media(media="print")
        assert not page.locator("nav.wide").is_visible()
        assert page.locator("#headline").is_visible()
        assert page.locator("details:not([open])").count() > 0
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open])").count() == 0
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("details:not([open])").count() > 0
        assert page.pdf()[:4] == b"%PDF"


def test_contents_mark_the_section_that_is_clicked_or_read(browser, files):
    with Opened(browser, files["hostile"]) as opened:
        page = opened.page
        current = page.locator("nav.wide a[aria-current]")
        assert current.get_attribute("href") == "#headline"
        page.locator("nav.wide a[href='#provenance']").click()
        assert current.get_attribute("href") == "#provenance"
        page.locator("#confusion button.cell").first.click()
        assert current.get_attribute("href") == "#confusion"
        page.keyboard.press("Escape")
        page.evaluate("document.getElementById('classes').scrollIntoView()")
        page.mouse.wheel(0, 1)
        expect = pytest.importorskip("playwright.sync_api").expect
        expect(current).to_have_attribute("href", "#classes")


def test_pictures_of_the_map_are_as_large_as_stored(browser, files):
    with Opened(browser, files["hostile"]) as opened:
        image = opened.page.locator(".preview img")
        assert image.evaluate("one => one.width == one.naturalWidth")
        opened.page.locator(".plot").focus()
        for _ in range(120):  # images, of which not all have a picture
            if image.count():
                opened.page.keyboard.press("ArrowRight")
        assert (
            "The page has 60 pictures" in opened.page.locator(".preview").inner_text()
        )


def test_in_a_narrow_window_the_map_scrolls_and_nothing_else_need(browser, files):
    with Opened(browser, files["multi"], NARROW) as opened:
        page = opened.page
        wide = "one => one.scrollWidth > one.clientWidth"
        assert not page.locator(".chart .scroll").first.evaluate(wide)
        assert page.locator(".plot svg").first.bounding_box()["width"] > NARROW
        assert not page.locator("#classes .scroll").evaluate(wide)
        assert page.locator("#classes td").last.is_visible()


def test_without_scripts_the_page_still_shows_its_pictures(browser, files):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(files["hostile"].as_uri())
    assert page.locator("main img[data-image]").count() > 6
    context.close()
