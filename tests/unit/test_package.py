"""What is packaged: files that tools look for, and addresses of pages that exist."""

import re
import shutil
import subprocess
import sys
from zipfile import ZipFile

import pytest

from moe_placement_plugin import __version__
from tests.support.paths import ROOT


def test_a_wheel_holds_the_types_marker_and_the_licence(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools builds the wheel")
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT / "moe_placement_plugin",
        tree / "moe_placement_plugin",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        folder = f"moe_placement_plugin-{__version__}.dist-info"
        metadata = wheel.read(f"{folder}/METADATA").decode()
    assert "moe_placement_plugin/py.typed" in names
    assert any(name.startswith(folder) and name.endswith("/LICENSE") for name in names)
    assert "Project-URL: Homepage, https://" in metadata and "Typing :: Typed" in metadata


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/deepseek-r1/README.md"]
)
def test_links_to_files_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target
