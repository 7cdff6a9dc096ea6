"""Ask what vLLM's arguments do with our flags, without starting an engine.

    python -m tests.support.vllm_flags_child attributes|configs|parser JSON
    python -m tests.support.vllm_flags_child

Without arguments a line on standard input is a question, ``[attributes|configs|parser, JSON]``, and
a line that begins with ANSWER holds ``{"answer": ..., "output": ...}``. vLLM's modules are imported
once then, which takes longer than all questions, and each is answered in a process forked from
there, before vLLM has loaded its general plugins. What depends on the command line or the
environment while vLLM is imported is asked in the first form.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback
import types
from dataclasses import asdict

MODULES = [
    "vllm.config.parallel",
    "vllm.config.vllm",
    "vllm.engine.arg_utils",
    "vllm.entrypoints.llm",
    "vllm.model_executor.layers.fused_moe.expert_map_manager",
    "vllm.model_executor.layers.fused_moe.routed_experts",
    "vllm.model_executor.layers.fused_moe.router.base_router",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
    "vllm.model_executor.layers.fused_moe.router.cpu_router",
    "vllm.model_executor.model_loader.base_loader",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.model_loader.weight_utils",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.gpu_model_runner",
]


def snapshot() -> dict[str, object]:
    """Return every attribute of every imported vLLM module and of every class in them."""
    seen: dict[str, object] = {}
    for name, module in list(sys.modules.items()):
        if not (name == "vllm" or name.startswith("vllm.")) or not isinstance(
            module, types.ModuleType
        ):
            continue
        for attribute, value in list(vars(module).items()):
            seen[f"{name}:{attribute}"] = value
            if isinstance(value, type) and value.__module__ == name:
                for inner, member in list(vars(value).items()):
                    seen[f"{name}:{attribute}.{inner}"] = member
                for field, info in vars(value).get("__dataclass_fields__", {}).items():
                    seen[f"{name}:{attribute}.{field} type"] = info.type
    return seen


def import_all() -> None:
    """Import what the questions are about, as a server without our flag does."""
    sys.argv = ["api_server"]
    for name in MODULES:
        importlib.import_module(name)


def attributes(argv: list[str]) -> dict:
    """Return names that differ after vLLM loaded its plugins, and names that hold our code.

    vLLM has built its parser by then, too.
    """
    import_all()
    before = snapshot()
    sys.argv = ["api_server", *argv]
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    after = snapshot()
    # vLLM's own note that plugins were loaded is no change of ours.
    own = {"vllm.plugins:plugins_loaded"}
    return {
        "changed": sorted(
            n for n, value in before.items() if after.get(n) is not value and n not in own
        ),
        "ours": sorted(
            n for n, value in after.items() if "moe_placement_plugin" in code_file(value)
        ),
        "count": len(before),
        "loaded": "moe_placement_plugin.engines.vllm" in sys.modules,
    }


def code_file(value: object) -> str:
    """Return the file that a function's code comes from, "" for anything else."""
    # Only real functions: vLLM's lazy modules import things when asked for attributes.
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    return function.__code__.co_filename if isinstance(function, types.FunctionType) else ""


def configs(requests: list[dict]) -> list[dict]:
    """Return what each EngineArgs request ends with: an error, or the placement it carries."""
    import moe_placement_plugin

    moe_placement_plugin.enable()
    from vllm.engine.arg_utils import EngineArgs

    from moe_placement_plugin.engines.vllm import state

    results = []
    for request in requests:
        import vllm

        version = vllm.__version__
        vllm.__version__ = request.pop("pretend_version", version)
        try:
            config = EngineArgs(max_model_len=256, **request).create_engine_config()
            settings = state.settings_of(config)
            plan = settings and settings.plan
            results.append(
                {
                    "strategy": settings and settings.strategy,
                    "digest": plan and plan.digest,
                    "value": config.parallel_config.expert_placement_strategy,
                    "hosts": settings and settings.hosts and asdict(settings.hosts),
                    "source": settings and settings.placement and settings.placement.source,
                    "nodes": plan and plan.metadata.get("node_of_rank"),
                }
            )
        except Exception as error:
            results.append({"error": type(error).__name__, "message": str(error)})
        finally:
            vllm.__version__ = version
    return results


def parser(argvs: list[list[str]]) -> list[dict]:
    """Return what ``vllm serve``'s parser makes of each command line.

    vLLM loads its plugins for the first.
    """
    sys.argv = ["api_server", *argvs[0]]
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.30
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = []
    for argv in argvs:
        sys.argv = ["api_server", *argv]
        try:
            engine_args = AsyncEngineArgs.from_cli_args(
                make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
            )
        except SystemExit as refused:
            found.append({"exit": refused.code})
        else:
            found.append(
                {
                    "strategy": engine_args.expert_placement_strategy,
                    "additional_config": engine_args.additional_config,
                }
            )
    return found


def in_a_fork(what: str, argument: object) -> dict:
    """Return the answer, None when the process died over the question, and what was printed."""
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as found:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                json.dump(globals()[what](argument), found)
                found.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(child, 0)
        for file in (printed, found):
            file.seek(0)
        text = found.read()
        return {"answer": json.loads(text) if text else None, "output": printed.read()}


def main() -> None:
    if len(sys.argv) > 1:
        print("ANSWER " + json.dumps(globals()[sys.argv[1]](json.loads(sys.argv[2]))))
        return
    import_all()
    for line in sys.stdin:
        print("ANSWER " + json.dumps(in_a_fork(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
