"""Read single experts anew, for any model, through SGLang's own loader.

The loader names them and puts them together. While the model loads it is noted which tensors of the
checkpoint ended in which expert. To read an expert, just those tensors are read and given to the
model's ``load_weights``; what its ``FusedMoE`` layers would write into slots goes into staging
memory instead.
"""

from __future__ import annotations

import bisect
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import PlacementError
from ...exchange.checkpoint import Checkpoint, Source
from .hook_registry import Hook
from .state import STATE

if TYPE_CHECKING:
    import torch

ALL = -1
"""Instead of an expert, for tensors that hold all experts of a layer."""


@dataclass
class Names:
    """Hold which tensors of the checkpoint hold which expert.

    Attributes:
        of: (layer, expert or `ALL`) -> names, in the order in which they came.
        parts: layer -> what the loader wrote for each expert: (its name of the weight, shard).
        folder: of the checkpoint; None while nothing was read.
        prefix: that SGLang puts before the names in the files.
    """

    of: dict[tuple[int, int], dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    parts: dict[int, set[tuple[str, str]]] = field(default_factory=lambda: defaultdict(set))
    folder: str | None = None
    prefix: str = ""
    _starts: list[int] = field(default_factory=list)
    _ranges: dict[int, tuple[int, str]] = field(default_factory=dict)
    _last: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def comes(self, name: str, tensor: torch.Tensor) -> None:
        """Note that the checkpoint brings a tensor."""
        with self._lock:
            self._comes(name, tensor.data_ptr(), tensor.nbytes)

    def _comes(self, name: str, begin: int, size: int) -> None:
        end = begin + size
        at = bisect.bisect_left(self._starts, begin)
        while at and self._ranges[self._starts[at - 1]][0] > begin:
            at -= 1
        until = at
        while until < len(self._starts) and self._starts[until] < end:
            # Of a tensor that is gone: its memory was used again.
            self._ranges.pop(self._starts[until])
            until += 1
        self._starts[at:until] = [begin]
        self._ranges[begin] = (end, name)
        self._last = name

    def goes(
        self, layer: int, expert: int | None, weight_name: str, shard: str, tensor: torch.Tensor
    ) -> None:
        """Note that a tensor, or a part of one, goes to an expert.

        It is known by where it lies in memory, since loaders may work in threads.
        """
        with self._lock:
            at = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
            name = self._last
            if at >= 0 and self._ranges[self._starts[at]][0] > tensor.data_ptr():
                name = self._ranges[self._starts[at]][1]
            if name is not None:
                self.of[layer, ALL if expert is None else int(expert)][name] = None
                self.parts[layer].add((weight_name, shard))

    def forget_places(self) -> None:
        """Forget where tensors lie in memory: loading has ended."""
        self._starts.clear()
        self._ranges.clear()
        self._last = None


@contextmanager
def learning(wanted: bool) -> Iterator[None]:
    """Note names while a model loads.

    Args:
        wanted: whether lost experts may have to be read one day.
    """
    if not wanted:
        yield
        return
    names = STATE.names.learning = Names()
    try:
        yield
        names.forget_places()
        STATE.names.known = names
    finally:
        STATE.names.learning = None


def forget() -> None:
    """Note that the weights are in no checkpoint: lost experts cannot be read any more."""
    STATE.names.known = None


def weights(original: Callable, self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
    """Note what comes from `DefaultModelLoader._get_weights_iterator`."""
    found, names = original(self, source, *args, **kwargs), STATE.names.learning
    return found if names is None else _noted(found, self, source, names)


def _noted(
    found: Iterator[tuple[str, torch.Tensor]], loader: Any, source: Any, names: Names
) -> Iterator[tuple[str, torch.Tensor]]:
    if names.folder is None:
        folder, _, safetensors = loader._prepare_weights(
            source.model_or_path, source.revision, source.fall_back_to_pt, *_more(loader, source)
        )
        names.folder, names.prefix = (folder if safetensors else None), source.prefix
    for name, tensor in found:
        names.comes(name, tensor)
        yield name, tensor


def _more(loader: Any, source: Any) -> tuple[Any, ...]:
    import inspect

    takes = "allow_patterns_overrides" in inspect.signature(loader._prepare_weights).parameters
    return (source.allow_patterns_overrides,) if takes else ()


def intercepted(
    layer: Any,
    param: Any,
    loaded_weight: Any,
    weight_name: str,
    shard_id: str,
    expert_id: int | None,
    fused: Callable | None = None,
) -> bool:
    """Note, or take, what a `FusedMoE` is to load; True when it must not go on.

    Args:
        layer: the ``FusedMoE``; the others are arguments of its ``weight_loader`` or
            ``weight_loader_fused``.
        fused: the original of the latter, for a tensor of all experts; ``expert_id`` is None then.
    """
    names = STATE.names
    if names.learning is not None:
        names.learning.goes(layer.layer_id, expert_id, weight_name, shard_id, loaded_weight)
    if names.wanted is None:
        return False
    names.wanted.take(layer, param, loaded_weight, weight_name, shard_id, expert_id, fused)
    return True


@dataclass
class Wanted:
    """Take experts that are being read.

    Attributes:
        out: (layer, expert) -> memory for each of the layer's tensors, of the shape of one slot.
        tensors: layer -> the engine's tensors, in the same order.
        filled: (layer, expert) -> what has come.
    """

    out: Mapping[tuple[int, int], Sequence[torch.Tensor]]
    tensors: Mapping[int, Sequence[torch.Tensor]]
    filled: dict[tuple[int, int], set[tuple[str, str]]] = field(
        default_factory=lambda: defaultdict(set)
    )

    def take(
        self,
        layer: Any,
        param: Any,
        loaded: torch.Tensor,
        weight_name: str,
        shard: str,
        expert: int | None,
        fused: Callable | None,
    ) -> None:
        """Put what goes to a wanted expert where it is wanted, as SGLang fills a slot."""
        number = layer.layer_id
        for at in [e for n, e in self.out if n == number] if expert is None else [int(expert)]:
            out = self.out.get((number, at))
            if out is None:
                continue
            slot = self._proxy(number, param, out)
            if slot is not None and expert is None:
                assert fused is not None, "all experts at once come with what loads them"
                fused(layer, slot, loaded[at : at + 1], weight_name, shard)
            elif slot is not None:
                layer._weight_loader_impl(
                    param=slot,
                    loaded_weight=loaded,
                    weight_name=weight_name,
                    shard_id=shard,
                    expert_id=0,
                )
            self.filled[number, at].add((weight_name, shard))

    def _proxy(self, layer: int, param: Any, out: Sequence[torch.Tensor]) -> Any:
        """Return ``param`` as if it had one slot, which lies in staging memory.

        None for what an exchange does not move.
        """
        import torch

        for tensor, memory in zip(self.tensors[layer], out):
            if tensor.data_ptr() == param.data_ptr() and tensor.shape == param.shape:
                proxy = torch.nn.Parameter(memory.unsqueeze(0), requires_grad=False)
                proxy.__dict__.update(vars(param))
                return proxy
        return None


class EngineReader:
    """Read lost experts as `checkpoint.ExpertReader` asks, through the model's own loader.

    Args:
        model: the model that is served.
        tensors: layer -> its tensors ``[slots, ...]`` that an exchange moves.

    Attributes:
        bytes_read: of the checkpoint, so far.
    """

    def __init__(self, model: Any, tensors: Mapping[int, Sequence[torch.Tensor]]):
        self._model, self._tensors = model, tensors
        self._checkpoint: Checkpoint | None = None

    def prefetch(self, experts: Iterable[tuple[int, int]]) -> None:
        """Have the disk begin with (layer, expert) that will be read."""
        with suppress(PlacementError):  # said when they are read
            known, checkpoint, names = self._names(experts)
            checkpoint.prefetch(Source(name.removeprefix(known.prefix)) for name in names)

    def _names(
        self, experts: Iterable[tuple[int, int]]
    ) -> tuple[Names, Checkpoint, dict[str, None]]:
        """Return what is known, the checkpoint, and its tensors that hold the experts."""
        known = STATE.names.known
        if known is None or known.folder is None:
            raise PlacementError(
                "lost experts cannot be read: its weights did not come from a safetensors "
                "checkpoint; restart the server with one"
            )
        chosen: dict[str, None] = {}
        for layer, expert in experts:
            found = {**known.of.get((layer, expert), {}), **known.of.get((layer, ALL), {})}
            if not found:
                raise PlacementError(
                    f"layer {layer}, expert {expert}: no tensor of the checkpoint was seen to "
                    "hold it; restart the server"
                )
            chosen |= found
        if self._checkpoint is None:
            self._checkpoint = Checkpoint(Path(known.folder))
        return known, self._checkpoint, chosen

    def read(self, layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
        """Fill the memory of one expert; see `read_all`."""
        return self.read_all([(layer, expert, out)])

    def read_all(self, wanted: Sequence[tuple[int, int, Sequence[torch.Tensor]]]) -> int:
        """Fill the memory of several experts, and return the bytes read.

        Args:
            wanted: layer, expert, and memory for each of the layer's tensors, of the shape of one
                slot.

        Raises:
            PlacementError: when the checkpoint or the model's loader does not bring them whole.
        """
        from . import evidence  # lazy: heavy

        # One expert may be wanted for several slots: it is read once.
        first: dict[tuple[int, int], Sequence[torch.Tensor]] = {}
        again = []
        for layer, expert, out in wanted:
            if (layer, expert) in first:
                again.append((first[layer, expert], out))
            else:
                first[layer, expert] = out
        known, checkpoint, chosen = self._names(first)
        before = checkpoint.bytes_read
        into = STATE.names.wanted = Wanted(first, self._tensors)
        try:
            self._load(
                (name, checkpoint.read(Source(name.removeprefix(known.prefix)))) for name in chosen
            )
        finally:
            STATE.names.wanted = None
            evidence.forget()
        for (layer, expert), _ in first.items():
            missing = known.parts[layer] - into.filled[layer, expert]
            if missing:
                raise PlacementError(
                    f"layer {layer}, expert {expert}: {type(self._model).__name__}'s loader did "
                    f"not bring {sorted(missing)}; restart the server"
                )
        for source, out in again:
            for a, b in zip(source, out):
                b.copy_(a)
        return checkpoint.bytes_read - before

    def _load(self, found: Iterator[tuple[str, torch.Tensor]]) -> None:
        import torch
        from sglang.srt.model_loader.utils import set_default_torch_dtype

        # Models list their experts' weights when they have loaded: the list that there is must
        # stay.
        listed = vars(self._model).get("routed_experts_weights_of_layer")
        dtype = next(self._model.parameters()).dtype
        with torch.no_grad(), set_default_torch_dtype(dtype):
            self._model.load_weights(found)
        if listed is not None:
            vars(self._model)["routed_experts_weights_of_layer"] = listed


def name_hooks() -> list[Hook]:
    """Return the hook that sees the checkpoint's tensors come."""
    return [
        Hook(
            name="eplb-names",
            target="sglang.srt.model_loader.loader:DefaultModelLoader._get_weights_iterator",
            hook=weights,
            relies_on=("source",),
            why="which tensors hold an expert is known to the model's loader only",
            upstream="SGLang #12068",
            removable_when="every model can name the tensors of an expert "
            "(generate_weight_name_filter)",
        )
    ]
