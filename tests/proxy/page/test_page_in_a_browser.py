"""The page as people see it: in headless Chromium, wide and narrow, light and dark. Skips itself where there is no browser."""

from __future__ import annotations

import asyncio
import itertools
import re
import shutil
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

async_api = pytest.importorskip("playwright.async_api", reason="needs playwright (pip install playwright)")

# what the browser itself says of a reply that is an error, and of one that never comes
EXPECTED = re.compile(r"Failed to load resource: (the server responded with a status of 40[01]|net::ERR_FAILED)")
expect = async_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the chromium command")

# of every element with text of its own: what it says, and the contrast of its colour with the nearest background behind it
CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = channels(colour).map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor, alpha = channels(colour)[3] ?? 1;
      if (alpha === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const words = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.textContent.trim()).join("");
    if (!words || element.disabled || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), is_svg = element.namespaceURI.endsWith("svg");
    const [a, b] = [light(is_svg ? style.fill : style.color), light(behind(element))].sort((x, y) => y - x);
    found.push([words, (a + 0.05) / (b + 0.05)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Any]:
    async with async_api.async_playwright() as playwright:
        expect.set_options(timeout=60_000)
        found = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        await found.close()


@pytest.fixture
async def opened(browser: Any, face: Any) -> AsyncIterator[Callable[..., Any]]:
    """opened(**context) -> the page, drawn. At the end nothing may have been refused by the policy or thrown."""
    contexts: list[Any] = []
    complaints: list[str] = []

    async def open_page(**context: Any) -> Any:
        contexts.append(await browser.new_context(**context))
        page = await contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: EXPECTED.match(message.text) or complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        await page.goto(face.http)
        await page.wait_for_selector("#workers tr")
        return page

    yield open_page
    for context in contexts:
        await context.close()
    assert complaints == []


async def test_a_prompt_is_sent_by_the_keyboard_and_its_tokens_are_shown(opened: Callable[..., Any], face: Any) -> None:
    page = await opened()
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.id") == "pause"
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.id") == "prompt"
    await page.keyboard.type("Hello <b>you</b>")
    await page.keyboard.press("Control+Enter")
    await page.wait_for_selector("#answer-bar .bar")
    assert await page.text_content("#answer") == "The quick brown fox, 日本語 and 😀 jumps over the lazy dog."
    assert "Hello <b>you</b>" in face.tokenizer.decode(list(face.workers.requests[-1].token_ids))
    await expect(page.locator("#requests tbody tr td").first).to_have_text("done")


async def test_an_answer_is_shown_while_it_comes_and_stop_ends_it(opened: Callable[..., Any], face: Any) -> None:
    face.workers.gate_at = 3
    page = await opened()
    await page.fill("#prompt", "Hello")
    await page.click("#send")
    await expect(page.locator("#answer")).to_have_text(re.compile("^The"))
    assert await page.is_disabled("#send") and await page.text_content("#answer-status") == "streaming"
    await page.click("#stop")
    await expect(page.locator("#answer-status")).to_have_text(re.compile("^stopped"))
    assert await asyncio.to_thread(face.workers.cancelled.wait, 60) and await page.is_enabled("#send")


async def test_an_error_is_shown_in_the_servers_words(opened: Callable[..., Any], face: Any) -> None:
    page = await opened()
    await page.fill("#prompt", "Hello")
    await page.fill("#max-tokens", "100000")
    async with page.expect_response("**/v1/chat/completions") as refused:
        await page.click("#send")
    await expect(page.locator("#answer-status")).to_have_text((await (await refused.value).json())["error"]["message"])


async def test_a_paused_page_asks_for_nothing_more(opened: Callable[..., Any]) -> None:
    page = await opened()
    await page.clock.install()
    await page.click("#pause")
    assert await page.get_attribute("#pause", "aria-pressed") == "true"
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.clock.run_for(30_000)
    assert asked == []
    async with page.expect_response("**/page/state"):
        await page.click("#pause")


async def test_a_proxy_that_is_gone_is_told_and_the_last_state_stays(opened: Callable[..., Any]) -> None:
    page = await opened()
    await page.route("**/page/state", lambda route: route.abort())
    await page.wait_for_selector("#trouble:visible")
    assert "does not answer" in await page.text_content("#trouble") and await page.locator("#workers tbody tr").count() == 2
    await page.unroute("**/page/state")
    await page.wait_for_selector("#trouble", state="hidden")


async def test_a_page_that_needs_a_key_asks_for_it_and_sends_it(opened: Callable[..., Any]) -> None:
    page = await opened()

    async def guarded(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer mine":
            await route.continue_()
        else:
            await route.fulfill(status=401, json={})

    await page.route("**/page/state", guarded)
    await page.wait_for_selector("#key:visible")
    assert "key" in await page.text_content("#trouble")
    await page.fill("#key", "mine")
    await page.keyboard.press("Enter")
    await page.wait_for_selector("#trouble", state="hidden")


async def test_it_can_be_read_wide_and_narrow_light_and_dark(opened: Callable[..., Any]) -> None:
    page = await opened()
    await page.fill("#prompt", "Hello")
    await page.click("#send")
    await page.wait_for_selector("#answer-bar .bar")
    await page.wait_for_selector("#requests tr")
    for width, scheme in itertools.product((1280, 320), ("light", "dark")):
        await page.set_viewport_size({"width": width, "height": 800})
        await page.emulate_media(color_scheme=scheme)
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        contrasts = await page.evaluate(CONTRASTS)
        assert len(contrasts) > 40
        assert [found for found in contrasts if found[1] < 4.5] == []


async def test_everything_has_a_name_for_those_who_do_not_see_it(opened: Callable[..., Any]) -> None:
    page = await opened()
    await page.fill("#prompt", "Hello")
    await page.click("#send")
    await page.wait_for_selector("#requests tr")
    unnamed = "[...document.querySelectorAll('[role=img]')].filter((one) => !one.getAttribute('aria-label')).length"
    assert await page.evaluate(unnamed) == 0
    for field in ("prompt", "max-tokens", "key"):
        assert await page.locator(f"label[for={field}]").count() == 1
    assert await page.get_by_role("heading", level=2).all_text_contents() == [
        "Time to first token",
        "Time per output token",
        "Workers",
        "KV cache by tier",
        "Try it",
        "Requests",
    ]
    assert await page.get_by_role("table").count() == 2 and await page.get_by_role("columnheader").count() == 14
