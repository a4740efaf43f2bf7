"""The page in a browser: nothing on its console, each figure there, tables that sort, a click that draws, names that stay text."""

import dataclasses
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import helpers
import pytest
from evaluations import of_findings
from learned import make_learned

import streamer
from streamer.detection.findings import Findings

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

MISSING = (
    None
    if BROWSER and DRIVER and find_spec("selenium")
    else "needs chromium, chromedriver and selenium"
)
"""Why there is no browser; None where there is one."""

OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--no-first-run",
)  # fmt: skip


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """Start a browser with an empty directory for its profile, which logs its console."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def look(
    driver: Any, page: Path, width: int = 1400, scheme: str = "light", media: str = ""
) -> list[str]:
    """Open a page on a screen of a width, light or dark; return what the console says."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    driver.get(page.as_uri())
    return [entry["message"] for entry in driver.get_log("browser")]


pytestmark = [pytest.mark.browser, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]

EVIL = "</script><svg onload=window.evil=1><img src=x onerror=window.evil=1>"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    return streamer.detect_intruder_dimensions(
        *helpers.three_shards(tmp_path_factory.mktemp("inputs"))
    )


@pytest.fixture(scope="module")
def page(found: Findings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    streamer.write_report(found, path)
    return path


@pytest.fixture(scope="module")
def measured(found: Findings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measured") / "report.html"
    streamer.write_report(of_findings(found), path)
    return path


def rows(driver: Any, table: str, column: int) -> list[str]:
    """The texts of a column of a table, as they stand."""
    script = "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].map((tr) => tr.children[arguments[1]].textContent)"
    return driver.execute_script(script, table, column)


def click(driver: Any, selector: str) -> None:
    driver.execute_script(
        "document.querySelector(arguments[0]).dispatchEvent(new MouseEvent('click', {bubbles: true}))",
        selector,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_every_figure_is_drawn_and_fits(
    driver: Any, page: Path, measured: Path, width: int, scheme: str
) -> None:
    maps = {"map of intruders", "map of energy", "all directions", "thresholds", "lambdas"}
    for path, names, matrices in (
        (page, maps, 7),
        (measured, {"trade-off forgetting", "trade-off divergence"}, 0),
    ):
        assert look(driver, path, width, scheme) == []
        assert driver.execute_script("return document.documentElement.dataset.drawn") == "yes"
        drawn = driver.execute_script(
            "return [...document.querySelectorAll('figure[data-figure]')]"
            ".map((f) => [f.dataset.figure, f.querySelectorAll('.scroll svg *').length])"
        )
        assert {name for name, _ in drawn if " of model." not in name} == names
        for kind in ("similarity of ", "spectrum of "):
            assert sum(name.startswith(kind) for name, _ in drawn) == matrices
        assert min(count for _, count in drawn) > 10
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert "NaN" not in driver.execute_script("return document.querySelector('main').outerHTML")
        dark = (
            driver.execute_script("return getComputedStyle(document.body).backgroundColor")
            != "rgb(255, 255, 255)"
        )
        assert dark == (scheme == "dark")


COVERED = """
const found = [];
for (const name of ["forgetting", "divergence"]) {
  const picture = document.querySelector(`figure[data-figure="trade-off ${name}"] .scroll svg`);
  const texts = [...picture.querySelectorAll("text:not([transform])")].map((node) => {
    const { x, width } = node.getBBox(), base = Number(node.getAttribute("y"));
    return { name: node.textContent, left: x, right: x + width, top: base - 8, bottom: base };
  });
  const points = [...picture.querySelectorAll("circle")].filter((node) => node.r.baseVal.value < 5).map((node) => {
    const { value: x } = node.cx.baseVal, { value: y } = node.cy.baseVal;
    const of = node.parentNode.querySelector("title").textContent;
    return { name: `point of ${of}`, left: x - 3, right: x + 3, top: y - 3, bottom: y + 3 };
  });
  const cover = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  texts.forEach((one, i) => {
    for (const other of [...texts.slice(i + 1), ...points]) if (cover(one, other)) found.push([name, one.name, other.name]);
  });
}
return found;
"""
"""Names of variants and ticks that lie on one another or on a point, where they are unreadable or seem to name another's point."""


@pytest.mark.parametrize("width", [400, 1400])
def test_no_name_in_a_trade_off_lies_on_a_point_or_another_name(
    driver: Any, measured: Path, width: int
) -> None:
    look(driver, measured, width)
    assert driver.execute_script(COVERED) == []


def test_a_print_is_light_and_has_no_controls(driver: Any, page: Path) -> None:
    assert look(driver, page, 800, "dark", "print") == []
    assert (
        driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert (
        driver.execute_script("return getComputedStyle(document.querySelector('.tools')).display")
        == "none"
    )


def test_tables_sort_by_numbers_and_names(
    driver: Any, page: Path, measured: Path, found: Findings
) -> None:
    look(driver, page)
    head = "#matrices thead th:nth-child({}) button"
    assert len(rows(driver, "matrices", 0)) == len(found)
    original = rows(driver, "matrices", 0)
    click(driver, head.format(8))
    norms = [float(cell) for cell in rows(driver, "matrices", 7)]
    assert norms == sorted(norms, reverse=True)
    assert len(set(norms)) > 1
    click(driver, head.format(8))
    assert [float(cell) for cell in rows(driver, "matrices", 7)] == sorted(norms)
    sort = "return document.querySelector('#matrices th:nth-child(8)').getAttribute('aria-sort')"
    assert driver.execute_script(sort) == "ascending"
    click(driver, head.format(1))
    assert rows(driver, "matrices", 0) == original
    look(driver, measured)
    heads = driver.execute_script(
        "return [...document.querySelectorAll('#variants th')].map((th) => th.textContent)"
    )
    at = [re.sub(r"\W+$", "", head) for head in heads].index("kept")
    click(driver, f"#variants thead th:nth-child({at + 1}) button")
    kept = [float(cell.partition("%")[0]) for cell in rows(driver, "variants", at)]
    assert kept == sorted(kept, reverse=True)


def test_figures_in_the_table_are_those_of_the_findings(
    driver: Any, page: Path, found: Findings
) -> None:
    look(driver, page)
    for i, name in enumerate(rows(driver, "matrices", 0)):
        m = found[name]
        assert int(rows(driver, "matrices", 3)[i]) == len(m.detection.intruders)
        assert float(rows(driver, "matrices", 5)[i]) == pytest.approx(
            min(m.detection.similarity), abs=6e-4
        )
        assert float(rows(driver, "matrices", 6)[i]) == pytest.approx(
            m.detection.singular_values[0], rel=1e-3
        )


def test_a_click_draws_a_matrix_and_narrows_the_table(
    driver: Any, page: Path, found: Findings
) -> None:
    look(driver, page)
    chosen = "return document.querySelector('.card.chosen h3').textContent"
    click(driver, "#matrices tbody tr:nth-child(5) button")
    assert driver.execute_script(chosen) == rows(driver, "matrices", 0)[4]
    click(driver, "figure[data-figure='map of energy'] rect.pick")
    assert len(rows(driver, "matrices", 0)) == 1
    assert driver.execute_script(chosen) == rows(driver, "matrices", 0)[0]
    click(driver, ".tools button")
    assert len(rows(driver, "matrices", 0)) == len(found)
    script = "const box = document.querySelector('input'); box.value = 'down'; box.dispatchEvent(new Event('input'))"
    driver.execute_script(script)
    assert all("down_proj" in name for name in rows(driver, "matrices", 0))
    assert driver.get_log("browser") == []


def test_a_command_is_copied_whole(driver: Any, page: Path) -> None:
    look(driver, page)
    click(driver, "pre.command button")
    commands = driver.execute_script(
        "return [...document.querySelectorAll('pre.command code')].map((c) => c.textContent)"
    )
    assert commands[0].startswith("streamer ")
    assert driver.execute_script("return getSelection().toString()") == commands[0]


def test_hostile_names_are_text(driver: Any, found: Findings, tmp_path: Path) -> None:
    matrices = tuple(
        dataclasses.replace(m, tensor=f"{EVIL}.{i}.weight") for i, m in enumerate(found)
    )
    evil = dataclasses.replace(
        found, matrices=matrices, sources={"base": {"name": EVIL}, "adapter": {"name": EVIL}}
    )
    streamer.write_report(evil, tmp_path / "evil.html")
    assert look(driver, tmp_path / "evil.html") == []
    assert driver.execute_script(
        "return window.evil === undefined && document.querySelector('img') === null"
    )
    assert rows(driver, "matrices", 0)[0] == f"{EVIL}.0.weight"


INTRUDERS = "map of intruders"
NORMS = "map of norms"
LOSSES = "map of losses"


@pytest.mark.parametrize(
    ("write", "options", "maps", "heads"),
    [
        (streamer.reduce_intruder_dimension, {}, [INTRUDERS, NORMS, LOSSES], ["scaled", "lost"]),
        (streamer.merge_with_reduced_intruder_dimensions, {}, [INTRUDERS, NORMS], ["scaled"]),
        (streamer.reduce_intruder_dimension, {"method": "shrink"}, [NORMS], ["lost"]),
    ],
    ids=["mitigate", "merge", "shrink"],
)
def test_the_page_of_an_output(
    driver: Any,
    found: Findings,
    tmp_path: Path,
    write: Any,
    options: dict[str, Any],
    maps: list[str],
    heads: list[str],
) -> None:
    """It shows what there is: a merge is not cut to a rank, a shrink scales no intruders and loses nothing."""
    base, adapter = helpers.three_shards(tmp_path)
    write(base, adapter, tmp_path / "out", **options or {"findings": found})
    streamer.write_report(tmp_path / "out", tmp_path / "out.html")
    assert look(driver, tmp_path / "out.html", 400) == []
    assert len(rows(driver, "matrices", 0)) == 9
    named = "return [...document.querySelectorAll('figure')].map((f) => f.dataset.figure)"
    assert driver.execute_script(named) == maps
    titles = driver.execute_script(
        "return [...document.querySelectorAll('#matrices th')].map((t) => t.textContent)"
    )
    assert [head for head in ("scaled", "lost") if any(head in title for title in titles)] == heads


def test_the_page_of_a_repair_leads_with_what_it_keeps_and_leaves(
    driver: Any, tmp_path: Path
) -> None:
    home = make_learned(tmp_path, 24, 32)
    texts = {name: home / f"{name}.npy" for name in ("general", "task")}
    record = streamer.repair_adapter(
        home / "base", home / "adapter", tmp_path / "out", **texts, on_event=str
    )
    streamer.write_report(tmp_path / "out", tmp_path / "out.html")
    assert look(driver, tmp_path / "out.html") == []
    assert (
        driver.execute_script("return document.querySelector('h1').textContent")
        == "Repair of adapter"
    )
    first = "return document.querySelector('figure').dataset.figure"
    assert driver.execute_script(first) == "trade-off divergence"
    points = "return [...document.querySelectorAll('figure:first-of-type g title')].map((t) => t.textContent)"
    drawn = driver.execute_script(points)
    for row in record["rows"]:
        assert any(title.startswith(f"{row['name']}: ") for title in drawn), row["name"]
    assert len(rows(driver, "variants", 0)) == len(record["rows"])
