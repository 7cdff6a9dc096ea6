"""Check that the examples for several hosts pass their formats' own linters."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ..integration.hosts.network import ROOT

EXAMPLES = ROOT / "examples" / "hosts"
SCRIPTS = [EXAMPLES / "slurm.sh", *sorted((ROOT / "scripts").glob("*.sh"))]


def tool(name: str) -> str:
    """Return a linter beside this interpreter, or on the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (requirements/vllm.txt has it)")
    return found


def lint(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts(script):
    lint(tool("shellcheck"), script)


def test_kubernetes():
    manifest = EXAMPLES / "kubernetes.yaml"
    lint(
        tool("yamllint"),
        "-d",
        "{extends: default, rules: {line-length: {max: 150}, comments: {min-spaces-from-content: "
        "1}}}",
        "-s",
        manifest,
    )
    lint(tool("kubernetes-validate"), "--strict", manifest)


@pytest.mark.engine  # no engine starts, but vLLM is imported
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed in this environment")
def test_slurm_gives_vllm_flags_that_it_has(tmp_path):
    """Run with a Slurm of one line: what each node would start."""
    fake = {
        "srun": '#!/bin/bash\nshift\nfor n in 0 1; do SLURM_NODEID=$n "$@"; done',
        # Its last line comes late: whoever closed the pipe after the first ends this with SIGPIPE.
        "scontrol": "#!/bin/bash\necho node0; sleep .2; echo node1",
        "vllm": '#!/bin/bash\necho "$@"',
    }
    for name, text in fake.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": "2",
    }
    done = subprocess.run(
        ["bash", EXAMPLES / "slurm.sh", "MODEL", "load.safetensors"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert (
        "--headless" not in first
        and "--headless" in second
        and "--node-rank 0" in first
        and "--node-rank 1" in second
    )
    assert first.replace("--node-rank 0", "") == second.replace("--headless ", "").replace(
        "--node-rank 1", ""
    )
    child = (
        "import sys; sys.argv[1:] = sys.argv[1].split()[2:]; "
        "from tests.support.vllm_headless import parser; print(parser().parse_args())"
    )
    parsed = subprocess.run(
        [sys.executable, "-c", child, second], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert parsed.returncode == 0, parsed.stderr[-2000:]
    for part in (
        "nnodes=2",
        "node_rank=1",
        "master_addr='node0'",
        "expert_placement_strategy='eplb'",
        "expert_host_timeout=60.0",
    ):
        assert part in parsed.stdout


def test_docs_name_flags_and_keys_that_there_are():
    """docs/hosts.md and README say the flags as the parsers have them.

    They also say the numbers of the code.
    """
    from moe_placement_plugin.engines.common import options
    from moe_placement_plugin.formats import packed
    from moe_placement_plugin.hosts import watch

    text = (ROOT / "docs" / "hosts.md").read_text()
    for flag in (options.LOCALITY.flag, options.HOST_TIMEOUT.flag):
        assert flag in text and flag in (ROOT / "README.md").read_text()
    assert (
        f"({watch.DEFAULT_TIMEOUT:g} s;" in text
        and f"{packed.LIMIT // 2**20} MiB" in text
        and watch.JOIN_TIMEOUT == 10 * watch.DEFAULT_TIMEOUT
    )
