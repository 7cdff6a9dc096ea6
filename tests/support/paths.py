"""Where things lie in this checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
FAULTS_SITE = ROOT / "tests" / "support" / "faults_site"
"""Put on ``PYTHONPATH``, it plants the faults that the environment names in every process of an engine."""
