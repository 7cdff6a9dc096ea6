"""What is indexed like experts: all places that the list names exist, the docs' table is its."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from moe_placement_plugin.engines.common import indexed_like_experts
from moe_placement_plugin.engines.common.indexed_like_experts import FATES, INDEXED
from tests.support.paths import ROOT

ENGINES = ROOT / "moe_placement_plugin" / "engines"


def names_in(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


@pytest.mark.parametrize("row", INDEXED, ids=lambda row: f"{row.engine}: {row.name}")
def test_a_row_names_what_becomes_of_it_and_where(row):
    assert row.fate in FATES and row.what and row.name
    place, _, rest = row.where.partition(":")
    if place == "engine":
        assert rest.strip()
    else:
        assert rest in names_in(ENGINES / place), f"{row.where} is not there any more"


def test_a_name_that_has_gone_is_seen():
    assert "experts_of_slots" in names_in(ENGINES / "vllm" / "lora.py")
    assert "no_such_function" not in names_in(ENGINES / "vllm" / "lora.py")


def test_rows_are_told_apart():
    assert len({(row.engine, row.name) for row in INDEXED}) == len(INDEXED)
    assert {row.engine for row in INDEXED} == {"vllm", "sglang"}


def test_refusals_of_sglang_have_a_rule():
    """A refused row that names the rules has one whose subject it is."""
    rules = (ENGINES / "sglang" / "placement_rules.py").read_text()
    for words in ("enable_lora", "modelopt_fp4", "waterfill", "kt_weight_path"):
        assert words in rules


def test_the_docs_table_is_printed_from_the_list():
    page = (ROOT / "docs" / "indexed-like-experts.md").read_text()
    begin = "<!-- table: python -m moe_placement_plugin.engines.common.indexed_like_experts -->\n"
    assert page.split(begin)[1].split("\n<!-- end of table -->")[0] == indexed_like_experts.table()
