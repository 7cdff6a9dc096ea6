#!/usr/bin/env bash
# Builds a Python environment in DIR in which SGLang's CPU engine runs with this plugin.
#
#   scripts/env-sglang.sh DIR [SGLANG_VERSION]        (default 0.5.20, the version of the test suite)
#
# A second call does nothing unless a requirement file, the stand-ins or the versions have changed. torch must be
# the CPU build, which PyPI does not have: requirements/sglang-cpu-torch.txt says where it comes from.
set -euo pipefail

dir=${1:?usage: env-sglang.sh DIR [SGLANG_VERSION]}
version=${2:-0.5.20}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
standins=$root/tests/support/sglang_cpu

inputs=("$root"/requirements/sglang-cpu*.txt "$root/pyproject.toml")
while IFS= read -r file; do inputs+=("$file"); done < <(find "$standins/src" "$standins/pyproject.toml" -name '*.py' -o -name pyproject.toml | sort) # not build/, which pip leaves there
stamp=$(
    {
        echo "sglang $version"
        "$python" --version
        (cd "$root" && echo "$root" && sha256sum "${inputs[@]#"$root/"}")
    } | sha256sum | cut -d' ' -f1
)
if [[ -f $dir/.stamp && $(<"$dir/.stamp") == "$stamp" ]]; then
    echo "environment $dir (sglang $version) is up to date"
    exit 0
fi

echo "building environment $dir for sglang $version (about two minutes)"
rm -f "$dir/.stamp"
if [[ ! -x $dir/bin/python ]]; then
    "$python" -m venv "$dir"
fi
# A pip configuration of the caller's may add files or links of its own; only the packages matter here.
pip=("$dir/bin/python" -m pip --disable-pip-version-check install --quiet)
"${pip[@]}" -r "$root/requirements/sglang-cpu-torch.txt"
"$dir/bin/python" - <<'PY'
import torch
if torch.version.cuda:
    raise SystemExit(f"torch {torch.__version__} is a CUDA build; the CPU build is wanted: see requirements/sglang-cpu-torch.txt")
PY
"${pip[@]}" --no-deps -r "$root/requirements/sglang-cpu.txt" "sglang==$version"
"${pip[@]}" -r "$root/requirements/sglang-cpu-tools.txt"
# SGLang must not see half of another copy: the stand-ins are installed, the plugin is linked to this checkout.
"${pip[@]}" --no-deps --force-reinstall "$standins"
"${pip[@]}" --no-deps --editable "$root"
"$dir/bin/python" -c "import sglang, torch, sgl_kernel, torchvision; print('sglang', sglang.__version__, 'torch', torch.__version__)"
echo "$stamp" > "$dir/.stamp"
