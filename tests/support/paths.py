"""Say where things lie in this checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
FAULTS_SITE = ROOT / "tests" / "support" / "faults_site"
"""On ``PYTHONPATH``, it plants faults in every process of an engine.

The environment names the faults.
"""
