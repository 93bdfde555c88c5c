"""report.html in a real browser: drawn in both colour schemes, never wider than the screen."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from dpo_cli.report.page import write_run_report
from dpo_cli.report.page_recipe import write_recipe_report
from page_runs import HOSTILE, POINTS, dpo_run, evaluation, jsonl, outcome

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
SCHEMES = {"light": (255, 255, 255), "dark": (0x15, 0x17, 0x1A)}  # the page's background
NARROW = 375  # pixels, a small phone

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is on PATH")
needs_driver = pytest.mark.skipif(DRIVER is None, reason="chromedriver is not on PATH")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A training run, an evaluation of several policies, a recipe; long words in all."""
    folder = tmp_path_factory.mktemp("reports")
    long = HOSTILE + "W" * 700
    samples = [
        {"step": step, "prompt": f"{word} {long}", "completion": long, "reward": 0.5}
        for step in (0, 5, 9)
        for word in ("one", "two")
    ]
    sft = dpo_run(folder / "01-dpo", samples=samples)
    points = [{**row, "gradient_steps": 40, "samples": 1280} for row in POINTS]
    two = evaluation(
        folder / "02-evaluate", 0.5, points_jsonl=jsonl(points), pictures=("frontier",)
    )
    rate = {"policy": "W" * 90, "opponent": "chosen", "judge": "reward_fn", "temperature": 1.0,
            "wins": 1, "losses": 2, "ties": 3, "errors": 0, "unasked": 0, "win_rate": 0.4,
            "low": 0.1, "high": 0.8}  # fmt: skip
    (two / "win_rates.json").write_text(json.dumps([rate]))
    facts = {
        "recipe": "small", "description": "x" * 300, "vars": {"path": "p" * 300}, "repeat": {},
        "steps": [outcome(sft), outcome(two)],
        "report": [{"label": name, "folders": [str(two)]} for name in ("SFT", "DPO" * 30)],
    }  # fmt: skip
    runs = [write_run_report(sft, {"fingerprint": "f" * 64}), write_run_report(two, {})]
    return [*runs, write_recipe_report(folder, facts)]


def browse(tmp_path: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    logs = ("--enable-logging=stderr", "--v=0")
    return subprocess.run(
        [BROWSER, *FLAGS, *logs, profile, *flags, page.as_uri()],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    words = ("Refused to", "Content Security Policy", "CONSOLE")
    return [line for line in done.stderr.splitlines() if any(word in line for word in words)]


def test_the_browser_reads_it_without_complaint(tmp_path, reports):
    headings = ("Completions before, during and after", "Frontier", "Each step")
    for page, heading in zip(reports, headings, strict=True):
        done = browse(tmp_path, page, "--dump-dom")
        assert complaints(done) == []
        assert f"<h2>{heading}</h2>" in done.stdout
        assert "<script" not in done.stdout


def test_the_policy_stops_what_is_not_of_the_page(tmp_path, reports):
    """And so the browser's silence above says something."""
    forged = tmp_path / "forged.html"
    text = reports[0].read_text(encoding="utf-8")
    forged.write_text(text.replace("</h1>", "</h1><script>document.title = 'run'</script>"))
    done = browse(tmp_path, forged, "--dump-dom")
    assert complaints(done)
    assert "<title>run</title>" not in done.stdout
    forged.write_text(text.replace("<style>", "<style>h1 { color: red }"))
    assert complaints(browse(tmp_path, forged, "--dump-dom"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_drawn(tmp_path, reports, scheme):
    dark = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
    for page in reports:
        picture = tmp_path / "page.png"
        browse(tmp_path, page, f"--screenshot={picture}", "--window-size=1280,1600", *dark)
        check_drawn(picture.read_bytes(), scheme, 1280)


def check_drawn(png: bytes, scheme: str, width: int) -> None:
    """On the scheme's background, with enough ink for a page of text."""
    pixels = (imread(io.BytesIO(png))[..., :3] * 255).round().astype(int)
    assert pixels.shape[1] == width
    assert tuple(pixels[0, 0]) == SCHEMES[scheme]
    ink = np.abs(pixels - np.array(SCHEMES[scheme])).sum(2) > 200
    assert 0.005 < ink.mean() < 0.5
    assert ink[:, : width // 2].any(1).mean() > 0.1  # rows of text, not one stray line


class Driver:
    """A browser session over the WebDriver protocol."""

    def __init__(self, url: str, profile: Path) -> None:
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": BROWSER}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self._url = f"{url}/session"
        self._url += "/" + self.call("", wanted)["sessionId"]

    def call(self, path: str, body: dict[str, Any], method: str = "POST") -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self._url + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def cdp(self, command: str, **params: Any) -> Any:
        return self.call("/goog/cdp/execute", {"cmd": command, "params": params})

    def run(self, script: str) -> Any:
        return self.call("/execute/sync", {"script": script, "args": []})

    def show(self, page: Path, scheme: str, width: int) -> None:
        metrics = {"width": width, "height": 812, "deviceScaleFactor": 1, "mobile": width < 500}
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.cdp("Emulation.setEmulatedMedia", features=[feature])
        self.call("/url", {"url": page.as_uri()})


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    assert DRIVER is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([DRIVER, f"--port={port}", "--log-level=OFF"])
    try:
        await_port(port)
        session = Driver(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("profile"))
        yield session
        session.call("", {}, "DELETE")
    finally:
        process.terminate()
        process.wait(30)


def await_port(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("chromedriver did not start")


@needs_driver
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_phone_never_scrolls_sideways(driver, reports, scheme):
    for page in reports:
        driver.show(page, scheme, NARROW)
        check_drawn(base64.b64decode(driver.cdp("Page.captureScreenshot")["data"]), scheme, NARROW)
        driver.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert driver.run("return innerWidth") == NARROW
        assert driver.run("return document.documentElement.scrollWidth") <= NARROW


@needs_driver
def test_a_phone_shows_whole_pictures(driver, tmp_path):
    """Of curves, win rates and frontiers, which are drawn for it; a wide screen has the others."""
    from matplotlib.figure import Figure

    folder = dpo_run(tmp_path / "r")
    for name, width in (("overview", 13.8), ("overview_narrow", 4.6)):
        Figure(figsize=(width, 6), dpi=150).savefig(folder / "plots" / f"{name}.png")
    page = write_run_report(folder, {})
    script = """
        const image = document.querySelector('figure img'), box = image.closest('.scroll');
        return [image.naturalWidth, image.width, box.scrollWidth - box.clientWidth];
    """
    driver.show(page, "light", NARROW)
    natural, shown, hidden = driver.run(script)
    assert (natural, hidden) == (690, 0)
    assert 320 <= shown <= NARROW
    driver.show(page, "light", 1280)
    natural, shown, hidden = driver.run(script)
    assert (natural, hidden) == (2070, 0)
    assert shown > 1000


@needs_driver
def test_tiles_and_columns_stand_on_one_line(driver, reports):
    """The figures of a row of tiles, and what several models wrote, start at one height."""
    script = """
        const rows = new Map();
        for (const box of document.querySelectorAll(arguments_)) {
            const top = Math.round(box.parentElement.getBoundingClientRect().top);
            rows.set(top, [...(rows.get(top) || []), Math.round(box.getBoundingClientRect().top)]);
        }
        return [...rows.values()];
    """
    driver.show(reports[0], "light", 1280)
    for selector in (".tiles dd", ".answers dd"):
        rows = driver.run(script.replace("arguments_", json.dumps(selector)))
        assert max(map(len, rows)) > 1
        assert all(len(set(row)) == 1 for row in rows)


@needs_driver
def test_text_has_enough_contrast(driver, reports):
    """WCAG 2.1 AA: 4.5 to 1, worked out from the colours that the browser computes."""
    script = """
        const found = new Set([getComputedStyle(document.body).backgroundColor]);
        for (const e of document.querySelectorAll('p, dt, dd, td, th, summary, small, caption'))
            found.add(getComputedStyle(e).color);
        return [...found];
    """
    for scheme, background in SCHEMES.items():
        driver.show(reports[2], scheme, 1280)
        page, *inks = [
            [int(part) for part in colour.strip("rgb()").split(",")]
            for colour in driver.run(script)
        ]
        assert tuple(page) == background
        assert len(inks) >= 3
        assert min(contrast(page, ink) for ink in inks) > 4.5


def contrast(one: list[int], other: list[int]) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: list[int]) -> float:
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
