"""The HTML page in a real browser: chromium, driven by selenium, without a screen and without a network."""

from __future__ import annotations

import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

selenium = pytest.importorskip("selenium", reason="selenium is not installed: the HTML page is not tried in a browser")

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By

import onnxprune
from chains import chain
from commands import ok
from onnxprune.report.page import page
from onnxprune.report.pictures import WINDOW

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures"
DENOISE, DIGITS = FIXTURES / "denoise", FIXTURES / "digits"
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync disable-dev-shm-usage"
)
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """Start a browser for the module's tests."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("chromium and chromedriver are not installed: the HTML page is not tried in a browser")
    options = ChromeOptions()
    options.binary_location = program
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = Chrome(options=options, service=ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Pages of a pruned image model and of one with a thousand layers."""
    folder = tmp_path_factory.mktemp("browser")
    ok(DENOISE / "denoise.onnx", folder / "out.onnx", "--target-mac", "0.5", "--data", DENOISE / "denoise_eval.npz",
       "--metric", "psnr", "--html", folder / "small.html", "-q")  # fmt: skip
    report = onnxprune.prune(chain(1000), target_mac=0.5, proof=False).report
    (folder / "large.html").write_text(page(report.to_json()))
    ok("inspect", DIGITS / "digits.onnx", "--html", folder / "alone.html", "-q")
    ok("sweep", DIGITS / "digits.onnx", *(f"--target-mac={share}" for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)), "--preset",
       "a", "--preset", "d", "--data", DIGITS / "digits_eval.npz", "--metric", "top1", "--jobs", "1", "--no-proof", "-q",
       "--html", folder / "sweep.html")  # fmt: skip
    return {name: folder / f"{name}.html" for name in ("small", "large", "alone", "sweep")}


def shown(browser: Chrome, path: pathlib.Path, width: int, scheme: str = "light") -> None:
    """Open a page in a window of this width; what went wrong while loading fails the test."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]


def column(browser: Chrome, number: int, table: str = "layers") -> list[str]:
    """Texts of a column of a table, of the rows that show."""
    script = (
        f"return [...document.querySelectorAll('#table-{table} tbody tr')].filter(r => !r.hidden)"
        f".map(r => r.cells[{number}].querySelector('data')?.value ?? r.cells[{number}].textContent)"
    )
    return list(browser.execute_script(script))


def head(browser: Chrome, number: int, table: str = "layers") -> Any:
    """The button in the head of a column of a table."""
    return browser.find_elements(By.CSS_SELECTOR, f"#table-{table} th")[number].find_element(By.TAG_NAME, "button")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["small", "large", "alone", "sweep"])
def test_the_page_fits_the_window(browser: Chrome, pages: dict[str, pathlib.Path], name: str, width: int) -> None:
    """No console errors, nothing sticks out at the side, and every chart has a size."""
    shown(browser, pages[name], width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    heights = browser.execute_script("return [...document.querySelectorAll('.chart svg')].map(s => s.clientHeight)")
    assert heights
    assert min(heights) > 100


@pytest.mark.parametrize("width", WIDTHS)
def test_crops_show(browser: Chrome, pages: dict[str, pathlib.Path], width: int) -> None:
    """Every picture is decoded and stands within the window."""
    shown(browser, pages["small"], width)
    each = "[i.complete, i.naturalWidth, i.clientWidth, i.getBoundingClientRect().right]"
    script = f"return [...document.images].map(i => {each})"
    images = browser.execute_script(script)
    assert len(images) == 16
    for complete, natural, client, right in images:
        assert complete
        assert natural == WINDOW
        assert client > 100
        assert right <= width


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["small", "large"])
def test_tables_sort(browser: Chrome, pages: dict[str, pathlib.Path], name: str, width: int) -> None:
    """A click on MAC sorts by number from the largest down, a second one up; names sort as text with numbers in it."""
    shown(browser, pages[name], width)
    first = column(browser, 5)
    browser.execute_script("arguments[0].click()", head(browser, 5))
    assert column(browser, 5) == sorted(first, key=float, reverse=True)
    browser.execute_script("arguments[0].click()", head(browser, 5))
    assert column(browser, 5) == sorted(first, key=float) != first
    browser.execute_script("arguments[0].click()", head(browser, 0))
    assert column(browser, 0) == [str(k + 1) for k in range(len(first))]
    names = column(browser, 1)
    browser.execute_script("arguments[0].click()", head(browser, 1))
    assert column(browser, 1) == sorted(names, key=natural)


def natural(name: str) -> list[str | int]:
    """Key that orders names as people do: 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def test_the_filter_filters(browser: Chrome, pages: dict[str, pathlib.Path]) -> None:
    """What is typed leaves the rows that hold all its words, says how many, and emptied brings all back."""
    shown(browser, pages["large"], 1280)
    field = browser.find_element(By.CSS_SELECTOR, "#table-layers input")
    field.send_keys("stages/3/ BLOCKS/7/")
    names = column(browser, 1)
    assert names == ["/stages/3/blocks/7/conv"]
    assert browser.find_element(By.CSS_SELECTOR, "#table-layers output").text == "1 of 1000 rows"
    field.clear()
    field.send_keys(" ")
    assert len(column(browser, 1)) == 1000
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]


def test_the_runs_of_a_sweep_sort_and_filter(browser: Chrome, pages: dict[str, pathlib.Path]) -> None:
    """The best run is one click away, what was asked for one word."""
    shown(browser, pages["sweep"], 1280)
    heads = [each.text.split()[0] for each in browser.find_elements(By.CSS_SELECTOR, "#table-runs th")]
    place = heads.index("top1")
    first = column(browser, place, "runs")
    assert len(first) == 12
    browser.execute_script("arguments[0].click()", head(browser, place, "runs"))
    assert column(browser, place, "runs") == sorted(first, key=float, reverse=True) != first
    rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#table-runs tbody tr")]
    browser.find_element(By.CSS_SELECTOR, "#table-runs input").send_keys("60.0")
    left = column(browser, place, "runs")
    assert len(left) == sum("60.0" in row for row in rows)
    assert 0 < len(left) < len(rows)


def test_sorting_a_thousand_rows_is_quick(browser: Chrome, pages: dict[str, pathlib.Path]) -> None:
    """The work of a click stays under a second on a slow machine."""
    shown(browser, pages["large"], 1280)
    script = "const begin = performance.now(); arguments[0].click(); return performance.now() - begin"
    assert browser.execute_script(script, head(browser, 5)) < 1000


def test_dark_is_dark(browser: Chrome, pages: dict[str, pathlib.Path]) -> None:
    """The page follows the system's colours, charts included."""
    colours = {}
    for scheme in ("light", "dark"):
        shown(browser, pages["small"], 1280, scheme)
        script = "const style = s => getComputedStyle(document.querySelector(s));"
        script += "return [style('body').backgroundColor, style('.chart text').fill]"
        colours[scheme] = browser.execute_script(script)
    assert sum(map(int, colours["light"][0].strip("rgb()").split(","))) > 700
    assert sum(map(int, colours["dark"][0].strip("rgb()").split(","))) < 100
    assert colours["light"][1] != colours["dark"][1]


def test_it_prints(browser: Chrome, pages: dict[str, pathlib.Path]) -> None:
    """Printed, tables are whole: a thousand rows take many pages, eight layers few."""
    sizes = {}
    for name in ("small", "large"):
        shown(browser, pages[name], 1280)
        sizes[name] = len(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert sizes["small"] > 10_000
    assert sizes["large"] > 2 * sizes["small"]
