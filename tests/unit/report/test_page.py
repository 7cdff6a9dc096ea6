"""Test the HTML page in headless Chromium: every figure is painted, nothing is fetched.

Also, nothing sticks out.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from moe_placement_plugin import ExpertLoad
from moe_placement_plugin.formats.plan_or_load import write
from tests.support.loads import skewed

CHROMIUM = next(
    (p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"
)

# Reads the painted page: size, and how many colours each canvas shows.
PROBE = """<script>
{
  const canvases = [...document.querySelectorAll("canvas")].map((c) => {
    const image = c.getContext("2d").getImageData(0, 0, c.width, c.height);
    const colours = new Set(new Uint32Array(image.data.buffer)).size;
    return { label: c.getAttribute("aria-label"), colours, width: c.clientWidth };
  });
  const first = document.querySelector("canvas"), box = first.getBoundingClientRect();
  const at = { clientX: box.left + 60, clientY: box.top + 12 };
  first.dispatchEvent(new PointerEvent("pointermove", at));
  const page = document.documentElement, style = getComputedStyle(document.body);
  page.dataset.probe = JSON.stringify({
    over: page.scrollWidth - innerWidth, width: innerWidth, canvases,
    painted: page.dataset.painted, tip: document.getElementById("tip").textContent,
    background: style.backgroundColor, text: style.color,
  });
}
</script></body>"""


def chromium(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Render a page with every kind of figure, and hostile names."""
    folder = tmp_path_factory.mktemp("page")
    pairs = np.random.default_rng(0).integers(0, 50, (4, 16, 16))
    load = skewed(
        coactivation=pairs + pairs.transpose(0, 2, 1),
        layer_ids=(3, 4, 5, 6),
        phases=("prefill", "decode", "decode"),
        metadata={"model": "</script><script>document.title='broken'</script>"},
    )
    from moe_placement_plugin.core.topology import Topology
    from moe_placement_plugin.report.data import make_report
    from moe_placement_plugin.report.page import render
    from moe_placement_plugin.simulation.cluster import Cluster
    from moe_placement_plugin.strategies import get_strategy

    request = Cluster(Topology(4), 4).request(load)
    placements = {name: get_strategy(name).place(request) for name in ("linear", "zigzag", "eplb")}
    report = make_report(["<b>load</b>"], [load], placements, layer=4)
    path = folder / "page.html"
    path.write_text(render(report))
    return path


def test_page_is_self_contained(page):
    text = page.read_text()
    assert not re.search(
        r"https?://|//[a-z]+\.|<link[^>]+href=\"(?!data:)|<img|@import|url\(", text
    )
    assert "&lt;b&gt;load&lt;/b&gt;" in text and "<b>load" not in text
    assert text.count("<script>") == 1


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_chromium(page, tmp_path, width, scheme):
    probed = tmp_path / "probed.html"
    text = page.read_text().replace("</body>", PROBE)
    if width < 500:
        # Chromium's windows are at least 500 px wide; a frame is as narrow as it is told to be.
        style = f"width:{width}px;height:1800px;border:0"
        frame = f'<iframe style="{style}" srcdoc="{html.escape(text)}"></iframe>'
        text = (
            "<!doctype html><meta name=color-scheme content='light "
            f"dark'>{frame}<script>document.querySelector('iframe').onload = (e) => "
            "{ document.documentElement.dataset.probe = "
            "e.target.contentDocument.documentElement.dataset.probe; };</script>"
        )
    probed.write_text(text)
    setting = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    done = chromium(
        tmp_path,
        f"--window-size={width},2000",
        setting,
        "--virtual-time-budget=2000",
        "--dump-dom",
        f"file://{probed}",
    )
    assert "CONSOLE" not in done.stderr, [
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    ]
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stdout[:500] + done.stderr[-500:]
    data = json.loads(html.unescape(found[1]))
    assert data["width"] == width and data["over"] <= 0, "the page is wider than the screen"
    # Load, three rank loads, balancedness by layer and over windows, co-activation.
    assert len(data["canvases"]) == int(data["painted"]) == 7
    for canvas in data["canvases"]:
        assert canvas["colours"] > 5, canvas
        assert 250 < canvas["width"] <= width
    assert data["tip"] == "layer 3, expert 0: " + data["tip"].split(": ")[1] and data[
        "tip"
    ].endswith("x the mean")
    dark = sum(map(int, re.findall(r"\d+", data["background"])[:3])) < 380
    assert dark == (scheme == "dark")
    assert contrast(data["background"], data["text"]) > 7
    if width > 500:
        assert "broken" not in re.findall(r"<title>(.*?)</title>", done.stdout)[0]


def contrast(a: str, b: str) -> float:
    """Return the WCAG contrast ratio of two CSS colours."""

    def luminance(colour: str) -> float:
        parts = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@needs_chromium
def test_screenshot(page, tmp_path):
    shot = tmp_path / "shot.png"
    chromium(
        tmp_path,
        "--window-size=1280,1200",
        "--virtual-time-budget=2000",
        f"--screenshot={shot}",
        f"file://{page}",
    )
    assert shot.stat().st_size > 20_000


@pytest.mark.slow
def test_figures_as_png(cli, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    path = tmp_path / "load.safetensors"
    pairs = np.ones((4, 16, 16), np.int64)
    write(skewed(coactivation=pairs), path)
    done = cli("show", path, "--ranks", 4, "--png", tmp_path / "png", "--json")
    names = {p.name for p in (tmp_path / "png").iterdir()}
    pairs_of = int((skewed().total.max(axis=1) / skewed().total.mean(axis=1)).argmax())
    assert names == {
        "load.png",
        "rank-load-linear.png",
        "rank-load-zigzag.png",
        "rank-load-eplb.png",
        "balancedness-by-layer.png",
        "balancedness-over-windows.png",
        f"coactivation-{pairs_of}.png",
    }
    assert all((tmp_path / "png" / n).read_bytes().startswith(b"\x89PNG") for n in names)
    assert set(json.loads(done.stdout)["balancedness"]) == {"linear", "zigzag", "eplb"}


def test_page_holds_the_load(page):
    """What the page draws is the load: the packed values are within half a step of it."""
    import base64

    data = json.loads(re.search(r"const DATA = (\{.*?\});\n", page.read_text(), re.S)[1])
    steps = np.frombuffer(base64.b64decode(data["load"]["data"]), "<u2").reshape(4, 16)
    total = ExpertLoad(skewed().counts).total.astype(float)
    expected = total / total.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(
        steps / 65535 * data["load"]["most"], expected, atol=data["load"]["most"] / 65535
    )
