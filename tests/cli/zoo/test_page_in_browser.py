"""The page of the results as people use it: in a real browser, from a file."""

import shutil
from urllib.parse import parse_qs, urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from zoo_rows import HOSTILE, many, measured, row

from convbn_fx.cli.zoo.page import write_page
from convbn_fx.cli.zoo.results import Status

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no chromium and chromedriver on PATH: apt-get install chromium chromium-driver",
)

ROWS = [
    measured(
        "zoo:b",
        family="zoo.one",
        kept=900,
        tune=300,
        output_error=3e-15,
        refused={"NOT_AFTER_CONVOLUTION": 3},
    ),
    measured(
        "zoo:a10",
        family="zoo.one",
        kept=10_000,
        tune=9000,
        output_error=0.5,
        status=Status.FAIL,
        detail="Wrong!",
    ),
    measured(
        "zoo:a9",
        family="zoo.two",
        kept=2_000_000_000,
        tune=1_000_000_000,
        deploy=800_000_000,
        output_error=float("nan"),
    ),
    measured("zoo:plain", family="zoo.plain", batch_norms=0, fused=0, kept=50, tune=50, output_error=2e-16),
    row("zoo:lost", family="zoo.two", status=Status.TIMEOUT, detail="stopped after 600 s"),
    row("zoo:homeless", family="", status=Status.UNBUILDABLE, detail=HOSTILE),
]
BY_NAME = ["zoo:a9", "zoo:a10", "zoo:b", "zoo:homeless", "zoo:lost", "zoo:plain"]


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument("--window-size=1400,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_page(folder / "few.html", ROWS, title="Few", source=HOSTILE)
    write_page(folder / "many.html", many(1400), title="Many", source="results.csv")
    write_page(folder / "none.html", [], title="None", source="results.csv")
    return folder


class Page:
    """What a person does with the page, and sees."""

    def __init__(self, driver, folder):
        self.driver = driver
        self.folder = folder

    def open(self, name="few", view=""):
        self.driver.get("about:blank")  # else the same file with another hash is not loaded again
        self.driver.get(f"{(self.folder / name).as_uri()}.html{view}")
        return self

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, condition):
        return WebDriverWait(self.driver, 20, poll_frequency=0.02).until(lambda _: condition())

    @property
    def count(self):
        return self.one("#count").text

    @property
    def names(self):
        """The visible models, once all are there."""
        shown = """return document.querySelectorAll("#models tbody tr:not([hidden])").length"""
        wanted = int(self.count.split()[0])
        self.until(lambda: self.run(shown) == wanted)
        return self.run("""return [...document.querySelectorAll("#models tbody tr")]
            .filter((row) => row.checkVisibility()).map((row) => row.cells[0].textContent)""")

    def heading(self, key):
        return self.one(f"#models button[data-key={key}]")

    @property
    def order(self):
        """The heading that says it is sorted by, and how."""
        script = """return [...document.querySelectorAll("#models th[aria-sort]")]
            .map((cell) => [cell.querySelector("button").dataset.key, cell.getAttribute("aria-sort")])"""
        (order,) = self.run(script)
        return tuple(order)

    def sort(self, key):
        self.run("arguments[0].scrollIntoView({inline: 'center'})", self.heading(key))
        self.heading(key).click()
        return self.names

    def filter(self, text="", status=None, family=None, norms=False):
        self.one("button[type=reset]").click()
        self.until(lambda: self.count.split()[0] == self.count.split()[2])
        if text:
            self.one("[name=q]").send_keys(text)
        if status:
            Select(self.one("[name=status]")).select_by_value(status)
        if family:
            Select(self.one("[name=family]")).select_by_value(family)
        if norms:
            self.one("[name=norms]").click()

    @property
    def view(self):
        """What the address says, in words."""
        return {key: value for key, (value,) in parse_qs(urlsplit(self.driver.current_url).fragment).items()}


@pytest.fixture
def page(driver, folder):
    yield Page(driver, folder)
    assert driver.get_log("browser") == []


# --- Sorting --------------------------------------------------------------------------------------------------------


def test_it_begins_with_all_models_by_name_the_numbers_in_it_as_numbers(page):
    page.open()
    assert page.names == BY_NAME
    assert page.count == "6 of 6 models"
    assert page.order == ("name", "ascending")
    assert not page.view


def test_the_heading_that_is_sorted_by_turns_round(page):
    page.open()
    assert page.sort("name") == BY_NAME[::-1]
    assert page.order == ("name", "descending")
    assert page.sort("name") == BY_NAME


def test_numbers_are_sorted_as_numbers_and_what_is_empty_is_last(page):
    page.open()
    unmeasured = ["zoo:homeless", "zoo:lost"]
    assert page.sort("bytes_eval") == ["zoo:plain", "zoo:b", "zoo:a10", "zoo:a9", *unmeasured]
    assert page.order == ("bytes_eval", "ascending")
    assert page.sort("bytes_eval") == ["zoo:a9", "zoo:a10", "zoo:b", "zoo:plain", *unmeasured]
    assert page.order == ("bytes_eval", "descending")


def test_errors_are_sorted_by_what_they_are_and_nan_is_the_worst(page):
    page.open()
    assert page.sort("output_error")[:4] == ["zoo:plain", "zoo:b", "zoo:a10", "zoo:a9"]
    assert page.sort("output_error")[:4] == ["zoo:a9", "zoo:a10", "zoo:b", "zoo:plain"]


def test_texts_are_sorted_and_what_is_empty_is_last(page):
    page.open()
    assert page.sort("family") == ["zoo:a10", "zoo:b", "zoo:plain", "zoo:a9", "zoo:lost", "zoo:homeless"]
    assert page.sort("family") == ["zoo:a9", "zoo:lost", "zoo:plain", "zoo:a10", "zoo:b", "zoo:homeless"]


def test_an_empty_note_is_last(page):
    page.open()
    empty = ["zoo:a9", "zoo:plain"]
    assert page.sort("notes")[-2:] == empty
    assert page.sort("notes")[-2:] == empty


def test_every_column_sorts_both_ways(page):
    page.open()
    keys = page.run(
        "return [...document.querySelectorAll('#models thead th button')].map((b) => b.dataset.key)"
    )
    assert len(keys) == 19
    for key in keys:
        page.run("arguments[0].click()", page.heading(key))
        assert page.order[0] == key
        first = page.order
        page.run("arguments[0].click()", page.heading(key))
        assert {first[1], page.order[1]} == {"ascending", "descending"}
        assert sorted(page.names) == sorted(BY_NAME)


# --- Filters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"text": "a1"}, ["zoo:a10"]),
        ({"text": "ZOO:A"}, ["zoo:a9", "zoo:a10"]),
        ({"text": "zoo.two"}, ["zoo:a9", "zoo:lost"]),
        ({"text": "timeout"}, ["zoo:lost"]),
        ({"text": "not after convolution"}, ["zoo:b"]),
        ({"text": "NOT_AFTER_CONV"}, ["zoo:b"]),
        ({"text": "  one   wrong "}, ["zoo:a10"]),
        ({"text": "wrong zoo.two"}, []),
        ({"text": "</script>"}, ["zoo:homeless"]),
        ({"text": "(.*"}, []),
        ({"status": "pass"}, ["zoo:a9", "zoo:b", "zoo:plain"]),
        ({"family": "zoo.one"}, ["zoo:a10", "zoo:b"]),
        ({"norms": True}, ["zoo:a9", "zoo:a10", "zoo:b"]),
        ({"status": "pass", "norms": True}, ["zoo:a9", "zoo:b"]),
        ({"status": "pass", "norms": True, "family": "zoo.one", "text": "b"}, ["zoo:b"]),
        ({"status": "timeout", "norms": True}, []),
    ],
)
def test_filters(page, filters, expected):
    page.open()
    page.filter(**filters)
    page.until(lambda: page.count == f"{len(expected)} of 6 models")
    assert page.names == expected


def test_the_choices_are_those_of_the_rows(page):
    page.open()
    choices = [
        [option.text for option in Select(page.one(f"[name={name}]")).options]
        for name in ("status", "family")
    ]
    assert choices == [
        ["all", "pass (3)", "fail (1)", "unbuildable (1)", "timeout (1)"],
        ["all", "zoo.one (2)", "zoo.plain (1)", "zoo.two (2)"],
    ]


def test_sorting_keeps_the_filter_and_filtering_the_order(page):
    page.open()
    page.filter(norms=True)
    assert page.sort("saved") == ["zoo:a10", "zoo:a9", "zoo:b"]
    page.one("[name=norms]").click()
    assert page.names == ["zoo:plain", "zoo:a10", "zoo:a9", "zoo:b", "zoo:homeless", "zoo:lost"]


def test_clearing_shows_all_models(page):
    page.open()
    page.filter(text="a1", status="fail", family="zoo.one", norms=True)
    page.until(lambda: len(page.view) == 4)
    page.one("button[type=reset]").click()
    page.until(lambda: page.count == "6 of 6 models")
    assert page.names == BY_NAME
    page.until(lambda: page.view == {})


# --- The address ----------------------------------------------------------------------------------------------------


def test_a_view_is_in_the_address_and_comes_back_from_it(page):
    page.open()
    page.filter(text="zoo: one", status="pass", family="zoo.one", norms=True)
    page.sort("saved")
    page.sort("saved")
    expected = {"q": "zoo: one", "status": "pass", "family": "zoo.one", "norms": "1", "sort": "-saved"}
    page.until(lambda: page.view == expected)
    shown = page.names
    page.open(view="#" + urlsplit(page.driver.current_url).fragment)
    assert page.names == shown == ["zoo:b"]
    assert page.order == ("saved", "descending")
    assert page.one("[name=q]").get_property("value") == "zoo: one"
    assert Select(page.one("[name=status]")).first_selected_option.text == "pass (3)"
    assert Select(page.one("[name=family]")).first_selected_option.text == "zoo.one (2)"
    assert page.one("[name=norms]").is_selected()
    assert page.view == expected


def test_a_view_makes_no_history(page):
    page.open()
    before = page.run("return history.length")
    page.filter(text="a1")
    page.until(lambda: page.view)
    assert page.run("return history.length") == before


@pytest.mark.parametrize(
    "view",
    ["#status=gone&family=gone&sort=gone&norms=yes", "#sort=-", "#chart-heading", "#%", "#q=&sort=__proto__"],
)
def test_an_address_that_makes_no_sense_shows_all_models(page, view):
    page.open(view=view)
    assert page.names == BY_NAME
    assert page.order == ("name", "ascending")
    for name in ("status", "family"):
        assert Select(page.one(f"[name={name}]")).first_selected_option.text == "all"


def test_an_address_that_is_changed_is_followed(page):
    page.open()
    page.run("location.hash = '#q=a9'")
    page.until(lambda: page.count == "1 of 6 models")
    page.driver.back()
    page.until(lambda: page.count == "6 of 6 models")
    assert page.names == BY_NAME


# --- The keyboard and what is read aloud ----------------------------------------------------------------------------


def press(page, *keys):
    page.driver.switch_to.active_element.send_keys(*keys)


def test_the_keyboard_does_it_all(page):
    page.open()
    page.one("[name=q]").click()
    press(page, "zoo.one", Keys.ENTER)  # which does not send the form
    assert page.count == "2 of 6 models"
    press(page, Keys.TAB)
    press(page, "f")
    assert page.names == ["zoo:a10"]
    press(page, "a")
    press(page, Keys.TAB, Keys.TAB, Keys.SPACE)
    assert (
        page.one("[name=norms]") == page.driver.switch_to.active_element
        or page.one("[name=norms]").is_selected()
    )


def test_headings_are_reached_and_pressed_by_keys(page):
    page.open()
    page.run("arguments[0].focus()", page.one("button[type=reset]"))
    press(page, Keys.TAB)
    assert page.driver.switch_to.active_element.get_attribute("role") == "region"  # arrows scroll it
    press(page, Keys.TAB)
    assert page.driver.switch_to.active_element == page.heading("name")
    press(page, Keys.ENTER)
    assert page.order == ("name", "descending")
    assert page.names == BY_NAME[::-1]
    press(page, Keys.SPACE)
    assert page.order == ("name", "ascending")
    assert page.driver.switch_to.active_element == page.heading("name")


def test_what_is_read_aloud(page):
    page.open()
    assert page.one("#count").aria_role == "status"
    assert page.one("[name=q]").accessible_name == "Filter"
    assert page.one("[name=norms]").accessible_name == "only models with batch norms"
    assert page.one(".models").accessible_name == "All models"
    assert page.one(".chart").accessible_name == "Memory saved, by family"
    assert page.one(".chart a").accessible_name.startswith("zoo.two: 50.0 % saved; Tune keeps 1.25 times")


# --- The chart, harm, and size --------------------------------------------------------------------------------------


def bars(page):
    script = """return [...document.querySelectorAll(".chart .bar")].map((bar) => {
        const { width, height } = bar.getBoundingClientRect();
        return [bar.closest("a").querySelector(".name").textContent, width, height];
    })"""
    return page.run(script)


def test_the_chart_has_a_bar_for_each_family_with_pairs(page):
    page.open()
    assert [name for name, *_ in bars(page)] == ["zoo.two", "zoo.one"]
    page.open("many")
    drawn = bars(page)
    assert sorted(name for name, *_ in drawn) == sorted(f"zoo.family_{number}" for number in range(25))
    assert all(width > 20 and height > 5 for _, width, height in drawn)
    assert [width for _, width, *_ in drawn] == sorted((width for _, width, *_ in drawn), reverse=True)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_legible_in_light_and_dark(page, theme):
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        page.open()
        script = """
            const numbers = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((part) => {
                const value = part / 255;
                return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
            });
            const light = (color) => { const [r, g, b] = numbers(color); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            const paper = light(getComputedStyle(document.body).backgroundColor);
            return [paper, arguments[0].map((selector) => {
                const style = getComputedStyle(document.querySelector(selector));
                const ink = light(selector === ".bar" ? style.backgroundColor : style.color);
                return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
            })]"""
        texts = [
            "h1",
            "td",
            "footer",
            "#models button",
            ".pass",
            ".fail",
            ".timeout",
            "summary",
            ".chart .name",
        ]
        paper, ratios = page.run(script, [*texts, ".bar"])
        assert (paper > 0.5) == (theme == "light")
        assert min(ratios[:-1]) >= 4.5, dict(
            zip(texts, ratios, strict=False)
        )  # WCAG: for texts, and for drawings
        assert ratios[-1] >= 3
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_click_on_a_bar_shows_its_family(page):
    page.open()
    page.one(".chart a").click()
    page.until(lambda: page.count == "2 of 6 models")
    assert page.names == ["zoo:a9", "zoo:lost"]
    assert page.view == {"family": "zoo.two"}
    top = "return document.querySelector('#models-heading').getBoundingClientRect().top"
    page.until(lambda: page.run(top) < 800)


def test_hostile_text_does_no_harm(page):
    page.open()
    assert page.run("return window.broken") is None
    assert page.run("return document.scripts.length") == 1
    assert page.run("return document.images.length") == 0
    note = "return [...document.querySelectorAll('#models tbody tr')].at(3).cells[18].textContent"
    assert page.run(note) == HOSTILE


def test_a_zoo_is_sorted_and_filtered_at_once(page):
    page.open("many")
    assert page.count == "1400 of 1400 models"
    assert len(page.names) == 1400
    spent = """
        const start = performance.now();
        arguments[0](document);
        document.body.offsetHeight; // lays the page out
        return performance.now() - start"""

    def seconds(action, *arguments):
        return page.run(spent.replace("arguments[0](document)", action), *arguments) / 1000

    # On two busy cores; a tenth of that elsewhere.
    assert seconds("document.querySelector('[data-key=bytes_eval]').click()") < 2
    kept = page.run(
        "return [...document.querySelectorAll('#models tbody tr')].map((row) => +row.cells[8].dataset.v || null)"
    )
    measured_ones = [value for value in kept if value is not None]
    assert len(measured_ones) == 1386
    assert measured_ones == sorted(measured_ones)
    assert kept[1386:] == [None] * 14
    page.filter(text="family_3 pass", norms=True)
    page.until(lambda: page.count == "35 of 1400 models")
    assert seconds("document.querySelector('[name=norms]').click()") < 2
    assert len(page.names) == int(page.count.split()[0])


def test_no_models_at_all(page):
    page.open("none")
    assert page.count == "0 of 0 models"
    assert page.sort("saved") == []
    assert page.order == ("saved", "ascending")


def test_the_headings_stay_in_sight(page):
    page.open("many")
    assert len(page.names) == 1400
    page.run("document.querySelector('.models').scrollTo(600, 5000)")
    script = """
        const frame = document.querySelector(".models").getBoundingClientRect();
        const heading = document.querySelector("#models thead").getBoundingClientRect();
        const name = document.querySelector("#models tbody th").getBoundingClientRect();
        return [heading.top - frame.top, name.left - frame.left]"""
    down, right = page.run(script)
    assert 0 <= down <= 2
    assert 0 <= right <= 2


def test_a_long_name_leaves_room_for_its_bar(page, folder):
    rows = [measured("zoo:a", family="zoo." + "x" * 300)]
    write_page(folder / "long.html", rows, title="Long", source="results.csv")
    page.open("long")
    ((_, width, height),) = bars(page)
    assert width > 20
    assert height > 5
    name, bar = (page.one(f".chart {selector}").rect for selector in (".name", ".bar"))
    assert name["x"] + name["width"] <= bar["x"]


def test_it_fits_a_telephone(page):
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open("many")
        assert page.run("return document.documentElement.scrollWidth") <= 390
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
