"""Tables that pages show are those that the code makes."""

from __future__ import annotations

from dataclasses import fields

import pytest

from moe_placement_plugin.engines.common import options
from moe_placement_plugin.engines.sglang import support as sglang_support
from moe_placement_plugin.engines.vllm import support as vllm_support
from moe_placement_plugin.rebalancing.decision import RebalancePolicy
from tests.support.paths import DOCS

MODULE = "python -m moe_placement_plugin.engines"


@pytest.mark.parametrize(
    ("page", "name", "end", "made"),
    [
        ("flags.md", f"{MODULE}.common.options", "table", options.table),
        ("flags.md", "rules", "table: rules", options.policy_table),
        ("vllm.md", f"{MODULE}.vllm.support", "table", vllm_support.table),
        ("sglang.md", f"{MODULE}.sglang.support", "table", sglang_support.table),
    ],
)
def test_the_page_shows_what_the_code_says(page, name, end, made):
    text = (DOCS / page).read_text()
    begin = f"<!-- table: {name} -->\n"
    assert begin in text
    assert text.partition(begin)[2].partition(f"\n<!-- end of {end} -->")[0] == made()


def test_a_docstring_describes_every_rule_of_rebalancing():
    assert list(options.attributes_of(RebalancePolicy)) == [f.name for f in fields(RebalancePolicy)]


def test_every_flag_is_named_as_its_keyword():
    for option in options.OPTIONS:
        assert option.flag == f"--{option.name.replace('_', '-')}" and option.help.endswith(".")
