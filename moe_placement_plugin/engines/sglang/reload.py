"""Take new weights for a model that serves.

They come by `/update_weights_from_*`, the checkpoint engine, sleep and wake. SGLang's loaders, and
ours for tensors of all experts, put them where the map in force has their experts, after rebalances
too. What was known of the old weights is forgotten; what would copy by position is refused before
anything is overwritten.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...core.errors import PlacementError
from . import draft_layers, evidence, expert_reader
from .hook_registry import Hook
from .layers import expert_layers
from .slot_digests import weights_are_whole, weights_change, weights_changed
from .state import STATE, placing

logger = logging.getLogger(__name__)

_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater"
_EXPORTER = "sglang.srt.model_executor.model_runner_components.weight_exporter:WeightExporter"
_SCHEDULER = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"

BY_NAME = (None, "flattened_bucket")
"""Values of ``load_format`` that go through the model's own loader.

Others copy tensors as they see fit.
"""

_RELIES_ON = {"update_weights_from_tensor": ("named_tensors", "load_format")}


@contextmanager
def _change(runner: Any) -> Iterator[list[bool]]:
    """Let the target model's weights change; the list gets whether all went well."""
    STATE.generation += 1
    weights_change(runner.model)
    evidence.forget()
    outcome = [False]
    try:
        yield outcome
    finally:
        evidence.forget()
        weights_changed(runner.model, outcome[-1])


def update(method: str, original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a method of SGLang's `WeightUpdater` that loads new weights.

    What was known of the old weights is forgotten.

    Args:
        method: its name.
        original: the method.
        self: SGLang's updater; the others are its arguments.

    Returns:
        SGLang's ``(succeeded, message)``; a refusal is one as well, it never ends the server.
    """
    runner = self.get_model_runner()
    call = inspect.signature(original).bind(self, *args, **kwargs).arguments
    draft = bool(getattr(runner, "is_draft_worker", False))
    refusal = None
    if not draft or _placed(runner.model):
        refusal = _by_position(runner.model, call)
    if refusal is not None:
        logger.error("%s", refusal)
        return False, refusal
    if draft:
        return _of_draft(original, self, *args, **kwargs)
    settings, before = placing(), weights_are_whole(runner.model)
    from_disk = method == "update_weights_from_disk"
    elastic = settings is not None and settings.rebalancing.elastic
    if elastic and not from_disk:
        # The checkpoint has other weights now: a lost expert is not to be had.
        expert_reader.forget()
    with _change(runner) as outcome, expert_reader.learning(elastic and from_disk):
        try:
            result = original(self, *args, **kwargs)
        except PlacementError as error:
            logger.error("%s", error)
            return False, f"{error}. Some weights may be new already: update all of them again"
        # The end of a session (0.5.23) brings nothing new: what its loads were stays.
        outcome.append(result[0] if isinstance(result, tuple) else before)
    return result


def _placed(model: Any) -> bool:
    """Tell whether experts of a draft lie elsewhere than in SGLang's own order."""
    rows = map(draft_layers.of_layer, expert_layers(model).values())
    return any(own is not None and not own.in_order for own in rows)


def _of_draft(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Load new weights of a draft, which go by its own rows.

    A draft has no digests, and EPLB moves none of its experts.
    """
    try:
        return original(self, *args, **kwargs)
    except PlacementError as error:
        logger.error("%s", error)
        return False, f"{error}. Some weights may be new already: update all of them again"
    finally:
        evidence.forget()


def _by_position(model: Any, call: dict[str, Any]) -> str | None:
    """Say why an update is refused: it copies tensors of experts by position.

    It is None when the update may go on.
    """
    how = call.get("load_format")
    if "named_tensors" not in call or how in BY_NAME or placing() is None:
        return None
    layers = tuple(f"{name}." for name in expert_layers(model))
    if how == "direct" and not any(name.startswith(layers) for name, _ in call["named_tensors"]):
        return None
    return (
        f"load_format {how} copies experts into slots by position, past their placement: leave "
        "load_format out, so that the model's own loader takes them, or start the server without "
        "the placement flags"
    )


def release(original: Callable, self: Any, recv_req: Any) -> Any:
    """Run `release_memory_occupation`, and forget the weights that it releases.

    Until they are loaded again, released weights are nobody's.
    """
    runner = self.tp_worker.model_runner
    if not _of_weights(recv_req):
        return original(self, recv_req)
    with _change(runner) as outcome:
        result = original(self, recv_req)
        outcome.append(_comes_back(runner))
    return result


def _of_weights(request: Any) -> bool:
    from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS

    return not request.tags or GPU_MEMORY_TYPE_WEIGHTS in request.tags


def _comes_back(runner: Any) -> bool:
    """Tell whether released weights come back as they were.

    They come from a copy on the host, or nothing was released.
    """
    from .compat import resolved  # lazy: heavy

    args = resolved(runner.server_args)
    saver = getattr(args, "enable_memory_saver", False)
    return not saver or bool(getattr(args, "enable_weights_cpu_backup", False))


def send(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse `send_weights_to_remote_instance`.

    Another server would take our slots for its own, by position.
    """
    if placing() is None:
        return original(self, *args, **kwargs)
    refusal = (
        "weights are not sent to another server by position while experts are placed: its slots "
        "hold other experts; load it from the checkpoint"
    )
    logger.error("%s", refusal)
    return False, refusal


def _methods() -> list[str]:
    """Return the methods of this version's `WeightUpdater` that write weights."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    names = (
        "update_weights_from_disk",
        "update_weights_from_tensor",
        "update_weights_from_distributed",  # up to 0.5.22, the next one from 0.5.23 on
        "load_weights_from_distributed",
        "update_weights_from_ipc",
        "end_weight_update",
    )
    return [name for name in names if hasattr(WeightUpdater, name)]


def reload_hooks() -> list[Hook]:
    """Return the hooks of a worker whose experts are placed or verified."""
    why = "digests and views of the old weights must go, and what copies by position be refused"
    return [
        *(
            Hook(
                name=f"new-weights-{name.replace('_', '-')}",
                target=f"{_UPDATER}.{name}",
                hook=functools.partial(update, name),
                relies_on=_RELIES_ON.get(name, ("self",)),
                why=why,
                upstream="SGLang #9923, #26015",
                removable_when="never: it is this plugin's own state",
            )
            for name in _methods()
        ),
        Hook(
            name="released-weights",
            target=f"{_SCHEDULER}.release_memory_occupation",
            hook=release,
            relies_on=("recv_req",),
            why="released weights may come back as anything until they are updated",
            removable_when="never: it is this plugin's own state",
        ),
        Hook(
            name="sent-weights",
            target=f"{_EXPORTER}.send_weights_to_remote_instance",
            hook=send,
            relies_on=("self",),
            why="a server with another placement would take each slot for its own",
            removable_when="weights are sent by logical expert",
            optional=True,
        ),
    ]
