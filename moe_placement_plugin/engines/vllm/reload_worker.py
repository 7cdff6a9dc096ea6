"""The ways in which a worker is told to update its weights: refused where they go by position, else
begun and ended as one (`reload`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...core.errors import PlacementError
from ..common.patching import Patch
from ..common.settings import Settings
from .layers import EPLB_ROW, moved_slots, routed_layers
from .reload import abandon, begin, finish, refuse_while_moving, updates_of
from .state import settings_of
from .weight_transfer import check_engine

_WORKER = "vllm.v1.worker.gpu_worker:Worker"


def _model_of(worker: Any) -> Any:
    runner = worker.model_runner
    return runner.get_model() if hasattr(runner, "get_model") else runner.model


def _alone(worker: Any) -> bool:
    return worker.vllm_config.parallel_config.data_parallel_size == 1


def _finish_worker(worker: Any, settings: Settings) -> None:
    """End an update; after one that left wrong weights the worker computes nothing until one has
    put them right.
    """
    try:
        finish(_model_of(worker), settings, _alone(worker))
    except PlacementError as refused:
        reason = str(refused)

        def execute_model(*args, **kwargs):
            raise PlacementError(
                f"the last update of weights went wrong, and no whole one has come since: {reason}"
            )

        worker.execute_model = execute_model
        raise
    vars(worker).pop("execute_model", None)


def _places_experts(model: Any) -> bool:
    return any(
        moved_slots(layer) or hasattr(layer, EPLB_ROW) for layer in routed_layers(model).values()
    )


def _refuse_kernel_format(model: Any, checkpoint_format: Any) -> None:
    if checkpoint_format is False and _places_experts(model):
        raise PlacementError(
            "new weights in the kernel's format (is_checkpoint_format=False) are copied by "
            "position, past the placement of experts: no "
            "weight was changed; send them in the checkpoint's format (is_checkpoint_format=True)"
        )


def _refuse_stacked_copies(model: Any) -> None:
    """vLLM up to 0.31 loses what a gpt-oss copies into parameters while they are being reloaded,
    and keeps the old experts.
    """
    from .stacked import _SPLITS, PICKS  # lazy: heavy

    for module in model.modules():
        if PICKS.get(type(module).__name__) == "block" and not hasattr(module, _SPLITS):
            raise PlacementError(
                "this version of vLLM does not put new expert weights into a "
                f"{type(module).__name__} that serves: no weight was changed; "
                "restart the server with the new checkpoint"
            )


def _check_reload(worker: Any, *args: Any, **kwargs: Any) -> None:
    model = _model_of(worker)
    if updates_of(model) is None:
        return
    _refuse_kernel_format(model, args[2] if len(args) > 2 else kwargs.get("is_checkpoint_format"))
    _refuse_stacked_copies(model)
    refuse_while_moving(model)


def _check_start(worker: Any, *args: Any, **kwargs: Any) -> None:
    model = _model_of(worker)
    _refuse_kernel_format(model, args[0] if args else kwargs.get("is_checkpoint_format"))
    if _places_experts(model):
        check_engine(getattr(worker, "weight_transfer_engine", None))
    _refuse_stacked_copies(model)
    refuse_while_moving(model)


def _check_sleep(worker: Any, level: int = 1, *args: Any, **kwargs: Any) -> None:
    settings = settings_of(worker.vllm_config)
    if settings is None or not settings.rebalancing.moves:
        return
    if level == 2:
        raise PlacementError(
            "sleep level 2 with --enable-eplb forgets which expert EPLB has put where: nothing was "
            "discarded; sleep at level 1"
        )
    refuse_while_moving(_model_of(worker))


CHECKS: dict[str, Callable[..., None]] = {
    "reload_weights": _check_reload,
    "start_weight_update": _check_start,
    "sleep": _check_sleep,
}
"""Method of a worker -> what refuses a call of it, with its arguments and without any effect."""


def reason_against(worker: Any, method: str, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Find out why a worker would refuse a call, None where it would not.

    Args:
        worker: vLLM's ``Worker``.
        method: one of `CHECKS`.
        args: of the call.
        kwargs: of the call.
    """
    if settings_of(worker.vllm_config) is None:
        return None
    try:
        CHECKS[method](worker, *args, **kwargs)
    except PlacementError as refused:
        return str(refused)
    return None


def _reload_weights(original):
    def reload_weights(self, *args, **kwargs):
        settings, model = settings_of(self.vllm_config), _model_of(self)
        if settings is None or updates_of(model) is None:
            return original(self, *args, **kwargs)
        _check_reload(self, *args, **kwargs)
        begin(model)
        try:
            result = original(self, *args, **kwargs)
        except BaseException:
            abandon(model)
            raise
        _finish_worker(self, settings)
        return result

    return reload_weights


def _start_weight_update(original):
    def start_weight_update(self, *args, **kwargs):
        settings = settings_of(self.vllm_config)
        if settings is not None:
            _check_start(self, *args, **kwargs)
        result = original(self, *args, **kwargs)
        if settings is not None:
            begin(_model_of(self))
        return result

    return start_weight_update


def _update_weights(original):
    def update_weights(self, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            abandon(_model_of(self))
            raise

    return update_weights


def _finish_weight_update(original):
    def finish_weight_update(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if (settings := settings_of(self.vllm_config)) is not None:
            _finish_worker(self, settings)
        return result

    return finish_weight_update


def _sleep(original):
    def sleep(self, level=1, *args, **kwargs):
        _check_sleep(self, level)
        return original(self, level, *args, **kwargs)

    return sleep


def reload_patches() -> list[Patch]:
    """The patches of a server whose weights may be updated."""
    why = "new weights are loaded by EPLB's first table, or by position, and digests are of the old"
    upstream = "vLLM PR 55228"
    gone = "vLLM loads new weights by the table in force"
    return [
        Patch(
            "reload",
            f"{_WORKER}.reload_weights",
            _reload_weights,
            why,
            upstream=upstream,
            removable_when=gone,
        ),
        Patch(
            "update-start",
            f"{_WORKER}.start_weight_update",
            _start_weight_update,
            why,
            upstream=upstream,
            removable_when=gone,
            optional=True,
        ),
        Patch(
            "update",
            f"{_WORKER}.update_weights",
            _update_weights,
            why,
            upstream=upstream,
            removable_when=gone,
            optional=True,
        ),
        Patch(
            "update-finish",
            f"{_WORKER}.finish_weight_update",
            _finish_weight_update,
            why,
            upstream=upstream,
            removable_when=gone,
            optional=True,
        ),
        Patch(
            "sleep",
            f"{_WORKER}.sleep",
            _sleep,
            "sleep level 2 loses EPLB's tables, which are no buffers of the model",
            relies_on=("level",),
            removable_when="vLLM keeps EPLB's tables while it sleeps",
        ),
    ]
