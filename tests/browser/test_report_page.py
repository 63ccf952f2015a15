"""The report in headless Chromium, as wide as a phone and as a desktop: fits, and shows itself."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_phf.report.page import write_report
from megatron_phf.report.runs import read_variants
from tests.report_runs import make_study

PHONE, DESKTOP, TALL = 390, 1280, 4000
# Runs in a page around the report, which is in a frame as wide as the device.
MEASURE = """
<iframe id="frame" style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>
<pre id="measured"></pre>
<script>
document.getElementById("frame").onload = (event) => {{
  const inner = event.target.contentDocument, root = inner.documentElement;
  const edge = (e) => e.getBoundingClientRect().right;
  const seen = [...inner.querySelectorAll("main *, header *")].filter((e) => !e.closest("svg"));
  document.getElementById("measured").textContent = JSON.stringify({{
    width: root.clientWidth, scroll: root.scrollWidth, height: root.scrollHeight,
    widest: Math.max(...seen.map(edge)),
    smallest: Math.min(...[...inner.querySelectorAll("svg text")].map(
      (e) => e.getBoundingClientRect().height).filter((h) => h > 0)),
    figures: [...inner.querySelectorAll("details[open] figure svg, .charts > figure svg")].filter(
      (e) => e.getBoundingClientRect().height > 50).length,
  }});
}};
</script>
"""


def chromium(directory: Path, *flags: str) -> str:
    """What a headless Chromium prints."""
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={directory / 'profile'}", "--virtual-time-budget=5000", *flags,
        ],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with a variant whose name is long and without a space."""
    directory = tmp_path_factory.mktemp("report")
    study = make_study(directory / "study", ("opsd", "phf", "no_space_at_all_" * 6), seeds=2)
    return Path(write_report(read_variants([str(study)]), str(directory)))


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_fits(page: Path, width: int) -> None:
    """No horizontal scrolling, nothing beyond the edge, charts drawn, their text not tiny."""
    around = page.parent / f"around_{width}.html"
    around.write_text(MEASURE.format(width=width, page=html.escape(page.read_text())))
    dom = chromium(page.parent, "--window-size=1400,1000", "--dump-dom", around.as_uri())
    found = re.search(r'<pre id="measured">(\{.*?\})</pre>', dom)
    assert found is not None
    measured = json.loads(html.unescape(found[1]))
    assert measured["width"] == width
    assert measured["scroll"] == width and measured["widest"] <= width
    assert measured["figures"] > 20 and measured["height"] > 3000
    assert measured["smallest"] >= 9  # pixels a line


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_screenshot_is_not_blank(page: Path, width: int) -> None:
    """Dark text on a light page, and the variants' colours."""
    picture = page.parent / f"{width}.png"
    chromium(page.parent, f"--window-size={width},{TALL}", f"--screenshot={picture}", page.as_uri())
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (TALL, width, 3)
    light, dark = (pixels.min(-1) > 235).mean(), (pixels.max(-1) < 110).mean()
    assert light > 0.6 and dark > 0.005
    for colour in ((0xD9, 0x77, 0x06), (0x25, 0x63, 0xEB)):  # OPSD's and PHF's
        assert (np.abs(pixels - colour).max(-1) < 8).sum() > 50
    rows = (pixels.min(-1) < 200).sum(1) > 3
    assert min(part.mean() for part in np.split(rows, 8)) > 0.1  # nowhere an empty stretch
