"""Test what the verb ``record`` says to bad input."""

from __future__ import annotations


def test_record_says_what_is_wrong(cli, tmp_path):
    prompts, path = tmp_path / "prompts.txt", tmp_path / "load"
    done = cli("record", path, code=2)
    assert str(path) in done.stderr
    assert "--prompts" in cli("record", path, "--url", "http://127.0.0.1:9", code=2).stderr
    prompts.write_text("\n")
    assert (
        "holds no prompt"
        in cli("record", path, "--url", "http://127.0.0.1:9", "--prompts", prompts, code=2).stderr
    )
    prompts.write_text('{"text": 1}\n')
    assert (
        "line 1"
        in cli("record", path, "--url", "http://127.0.0.1:9", "--prompts", prompts, code=2).stderr
    )
    prompts.write_text("hello\n")
    assert (
        "cannot be reached"
        in cli("record", path, "--url", "http://127.0.0.1:9", "--prompts", prompts, code=2).stderr
    )
