"""The page at /: its files, and what a person sees and does in a browser."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
import uvicorn
from _support.serving import DATA, client_of
from _support.toy import toy_model

from r2ec_fast.serve.http.app import create_app
from r2ec_fast.serve.service import Service

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MARKUP = "<b>bold</b> teapot"  # a title that must stay text
LONG = "6000"  # tokens of a reasoning that nobody waits for

# lengths of the reasoning as it grows, and whether the items were there
WATCH = """() => {
  window.seen = [];
  const box = document.getElementById("reasoning");
  new MutationObserver(() => {
    const items = document.getElementById("lists").innerText.includes("Change");
    window.seen.push([box.textContent.length, items]);
  }).observe(box, { childList: true });
}"""


@pytest.fixture(scope="module")
def service():
    model = toy_model(dtype=torch.float32, max_position_embeddings=8192).eval()
    served = Service(model, DATA.data.catalog, data=DATA)
    served.put_items([("i16", {"title": MARKUP})])
    yield served
    served.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser on the path: {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def serving(service: Any, **settings: Any) -> Iterator[str]:
    """The address of a server in a thread."""
    config = uvicorn.Config(create_app(service, **settings), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def opened(
    browser: Browser, url: str, *, width: int = 1280, refused: Sequence[str] = ()
) -> Iterator[Page]:
    """The page in a new session. Anything in its console fails the test, but for what the browser
    says of requests that fail in the ways ``refused``."""
    context = browser.new_context(viewport={"width": width, "height": 800})
    page, said = context.new_page(), []
    page.set_default_timeout(30_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(url)
    yield page
    context.close()
    known = "Failed to load resource: "
    assert [
        text
        for text in said
        if not (text.startswith(known) and any(way in text for way in refused))
    ] == []


@pytest.fixture(scope="module")
def url(service: Any) -> Iterator[str]:
    with serving(service) as address:
        yield address


def add(page: Page, *titles: str) -> None:
    """Search for titles and click them."""
    for title in titles:
        page.get_by_label("Search the catalog").fill(title)
        page.get_by_role("button", name=f"Add {title}").click()


def recommend(page: Page) -> None:
    page.get_by_role("button", name="Recommend", exact=True).click()


def history(page: Page) -> list[str]:
    return page.locator("#history .title").all_inner_texts()


def answered(page: Page, caption: str = "With reasoning") -> Any:
    """The table of items, once it is there."""
    table = page.get_by_role("table", name=caption)
    table.wait_for()
    return table


# ---- without a browser --------------------------------------------------------------------------


def test_files_and_headers(service):
    with client_of(service, keys=["k"]) as client:
        answer = client.get("/")
        assert answer.status_code == 200 and "<noscript>" in answer.text
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self';") and "unsafe" not in policy
        names = re.findall(r'(?:href|src)="([\w.]+\.\w+)"', answer.text)
        assert {"app.js", "style.css", "favicon.svg"} <= set(names)
        scripts = {name: client.get(f"/{name}") for name in names}
        imports = re.findall(r'from "\./(\w+\.js)"', scripts["app.js"].text)
        scripts |= {name: client.get(f"/{name}") for name in imports}
        assert all(file.status_code == 200 for file in scripts.values())
        assert all("innerHTML" not in file.text for file in scripts.values())
        for name, file in scripts.items():
            if name.endswith(".js"):
                assert "javascript" in file.headers["Content-Type"]
        assert "Content-Security-Policy" not in client.get("/docs").headers


# ---- in a browser -------------------------------------------------------------------------------


@pytest.mark.browser
def test_reasoning_is_seen_as_it_is_written(browser, url):
    with opened(browser, url) as page:
        add(page, "red kettle", "blue mug")
        page.get_by_label("Longest reasoning").fill("200")
        page.get_by_label("Items", exact=True).fill("5")
        page.evaluate(WATCH)
        recommend(page)
        table = answered(page)
        page.get_by_role("columnheader", name="Change").wait_for()
        written = [length for length, items in page.evaluate("window.seen") if not items]
        assert len({length for length in written if length}) > 5
        assert written == sorted(written)

        rows = table.locator("tbody tr")
        assert rows.count() == 5
        assert rows.first.locator("td").first.inner_text() == "1"
        shown = table.locator("tbody th").all_inner_texts()
        assert not any("red kettle" in text or "blue mug" in text for text in shown)
        assert re.search(r"\d%\s+-?\d+\.\d{3}", rows.first.inner_text())

        direct = page.get_by_role("table", name="Direct, without reasoning")
        assert direct.locator("tbody tr").count() == 5
        changes = table.locator("tbody tr td:last-child").all_text_contents()
        pattern = r"(▲ up|▼ down) \d+ from \d+|=same rank|new: not among direct's first \d+"
        assert all(re.fullmatch(pattern, change) for change in changes), changes

        measured = page.locator("#measured").inner_text()
        for word in ("Waiting", "Prompt", "Reasoning", "Search", "Total", "computed", "version 1"):
            assert word in measured
        assert "5 items in" in page.locator("#status").inner_text()


@pytest.mark.browser
def test_ranks_of_both_modes_fit_the_changes_shown(browser, url):
    with opened(browser, url) as page:
        add(page, "green bowl")
        page.get_by_label("Longest reasoning").fill("30")
        page.get_by_label("Items", exact=True).fill("16")
        recommend(page)
        table = answered(page)
        page.get_by_role("columnheader", name="Change").wait_for()
        direct = page.get_by_role("table", name="Direct, without reasoning")
        before = {t: i for i, t in enumerate(direct.locator("th[scope=row]").all_inner_texts())}
        rows = table.locator("tbody tr")
        for i in range(rows.count()):
            moved = before[rows.nth(i).locator("th").inner_text()] - i
            change = rows.nth(i).locator("td").last.text_content()
            word = f"▲ up {moved} " if moved > 0 else f"▼ down {-moved} " if moved else "=same"
            assert change.startswith(word)


@pytest.mark.browser
def test_history_is_sent_as_it_was_put_together(browser, url):
    with opened(browser, url) as page:
        add(page, "red kettle", "blue mug", "green bowl", "white lamp")
        page.get_by_role("button", name="Move green bowl up").click()
        page.get_by_role("button", name="Remove white lamp").click()
        assert history(page) == ["red kettle", "green bowl", "blue mug"]
        page.get_by_label("Rating of green bowl").fill("4.5")
        page.get_by_role("button", name="Move red kettle down").click()
        page.get_by_label("Direct", exact=True).check()
        assert page.get_by_label("Longest reasoning").is_disabled()
        with page.expect_request("**/v1/recommend") as sent:
            recommend(page)
        assert sent.value.post_data_json == {
            "mode": "direct",
            "k": 10,
            "history": [{"item": "i10", "rating": 4.5}, {"item": "i0"}, {"item": "i5"}],
        }
        answered(page, "Direct, without reasoning")
        assert page.get_by_role("table", name="With reasoning").count() == 0
        page.get_by_role("button", name="Clear").click()
        assert history(page) == []
        recommend(page)
        alert = page.get_by_role("alert").filter(has_text="History")
        alert.wait_for()
        assert "at least one item" in alert.inner_text()
        query = page.get_by_label("Search the catalog")
        assert query.get_attribute("aria-invalid") == "true"
        add(page, "red mug")
        assert page.locator("#error").inner_text() == ""


@pytest.mark.browser
def test_titles_stay_text(browser, url):
    with opened(browser, url) as page:
        add(page, MARKUP)
        assert history(page) == [MARKUP]
        add(page, "red mug")
        page.get_by_role("button", name="Remove <b>bold").click()
        page.get_by_label("Direct", exact=True).check()
        page.get_by_label("Items", exact=True).fill("17")
        recommend(page)
        assert MARKUP in answered(page, "Direct, without reasoning").inner_text()
        assert page.locator("b").count() == 0


@pytest.mark.browser
def test_stop(browser, url):
    with opened(browser, url) as page:
        add(page, "red kettle")
        page.get_by_label("Longest reasoning").fill(LONG)
        recommend(page)
        page.locator("#reasoning").get_by_text(re.compile(".{20}", re.S)).wait_for()
        page.get_by_role("button", name="Stop").click()
        assert page.locator("#status").inner_text() == "Stopped."
        written = page.locator("#reasoning").inner_text()
        page.wait_for_timeout(300)
        assert page.locator("#reasoning").inner_text() == written
        assert page.get_by_role("table", name="With reasoning").count() == 0
        assert page.get_by_role("button", name="Stop").is_hidden()

        page.get_by_label("Longest reasoning").fill("20")  # and again
        recommend(page)
        answered(page)


@pytest.mark.browser
def test_error_names_the_field(browser, url):
    with opened(browser, url, refused=["404"]) as page:
        page.get_by_label("A known user").check()
        user = page.get_by_label("User id")
        user.fill("nobody")
        recommend(page)
        alert = page.get_by_role("alert").filter(has_text="User id")
        alert.wait_for()
        assert "unknown id 'nobody'" in alert.inner_text()
        assert user.get_attribute("aria-invalid") == "true"
        user.fill("u3")
        assert user.get_attribute("aria-invalid") is None
        page.get_by_label("Longest reasoning").fill("20")
        recommend(page)
        answered(page)
        assert page.locator("#error").inner_text() == ""


@pytest.mark.browser
def test_server_that_goes_away(browser, service):
    with serving(service) as address, opened(browser, address, refused=["ERR_FAILED"]) as page:
        add(page, "red kettle")
        page.route("**/v1/recommend", lambda route: route.abort())
        recommend(page)
        page.get_by_role("alert").filter(has_text="could not be reached").wait_for()


@pytest.mark.browser
def test_key_is_asked_for_and_kept_in_the_tab(browser, service):
    with (
        serving(service, keys=["right"]) as address,
        opened(browser, address, refused=["401"]) as page,
    ):
        dialog = page.get_by_role("dialog")
        dialog.wait_for()
        key = page.get_by_label("Key", exact=True)
        key.fill("wrong")
        key.press("Enter")
        page.get_by_text("The server does not know this key.").wait_for()
        key.fill("right")
        key.press("Enter")
        page.get_by_role("button", name="Add red mug").wait_for()
        assert page.locator("#model").inner_text() == "r2ec"
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        add(page, "red mug")
        page.get_by_label("Longest reasoning").fill("20")
        recommend(page)
        answered(page)
        page.reload()  # the tab still has it
        page.get_by_role("button", name="Add red mug").wait_for()
        assert dialog.is_hidden()

        page.evaluate("sessionStorage.clear()")
        page.reload()
        dialog.wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("alert").filter(has_text="one of the server's keys").wait_for()


@pytest.mark.browser
def test_keyboard_alone(browser, url):
    with opened(browser, url) as page:
        page.get_by_role("button", name="Add red mug").wait_for()

        def tab_to(selector: str) -> None:
            for _ in range(40):
                page.keyboard.press("Tab")
                focused = page.locator(":focus")
                # a radio's ring is around its label
                ring = focused.evaluate(
                    "e => getComputedStyle(e.type === 'radio' ? e.parentElement : e).outlineStyle"
                )
                assert ring != "none", focused.evaluate("e => e.outerHTML")
                if focused.evaluate("(e, selector) => e.matches(selector)", selector):
                    return
            raise AssertionError(f"{selector} cannot be reached")

        tab_to("#query")
        page.keyboard.type("mug")
        page.get_by_text("4 found").wait_for()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        assert history(page) == ["red mug", "blue mug"]
        tab_to("[data-action=down]")
        page.keyboard.press("Enter")
        assert history(page) == ["blue mug", "red mug"]
        focused = page.locator(":focus")
        assert focused.get_attribute("aria-label") == "Move red mug up"
        tab_to("[data-action=remove]")
        page.keyboard.press("Enter")
        assert history(page) == ["blue mug"]
        assert page.locator(":focus").get_attribute("aria-label") == "Remove blue mug"
        tab_to("#longest")
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.type(LONG)
        tab_to("#go")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Stop").wait_for()
        tab_to("#stop")
        page.keyboard.press("Enter")
        assert page.locator("#status").inner_text() == "Stopped."
        assert page.locator(":focus").get_attribute("id") == "results"
        assert page.locator("[tabindex]").evaluate_all("all => all.every(e => e.tabIndex <= 0)")


@pytest.mark.browser
@pytest.mark.parametrize("width", (320, 360))
def test_narrow_window(browser, url, width):
    with opened(browser, url, width=width) as page:
        add(page, "red kettle", "blue mug")
        page.get_by_label("Longest reasoning").fill("50")
        recommend(page)
        answered(page)
        page.get_by_role("columnheader", name="Change").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="Clear").click()
        recommend(page)
        page.get_by_role("alert").filter(has_text="at least one item").wait_for()
        sync_api = pytest.importorskip("playwright.sync_api")
        sync_api.expect(page.locator("#error")).to_be_in_viewport()


@pytest.mark.browser
def test_the_api_page_still_works(browser, url):
    with opened(browser, url) as page:
        page.get_by_role("link", name="API").click()
        page.get_by_text("/v1/recommend", exact=False).first.wait_for()
