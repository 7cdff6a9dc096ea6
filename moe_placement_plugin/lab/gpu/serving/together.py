"""Keep servers up at once: started side by side, ended all together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from .... import PlacementError
from ...servers.server import Server
from .server_logs import PORT_TAKEN


def start(
    servers: Mapping[str, Server],
    at_once: int,
    say: Callable[[str], None],
    fail: Callable[[str], None],
) -> dict[str, Server]:
    """Start all; one that lost a port to another that started beside it starts once more, at once.

    Args:
        servers: name -> server.
        at_once: how many start at the same time.
        say: told what happens.
        fail: told which server is left out, and why.

    Returns:
        Those that are up.

    Raises:
        PlacementError: when the first is not, which the others are compared with.
    """
    errors = _errors(servers, at_once, say)
    for name, error in errors.items():
        if error is not None:
            why, _, log = error.partition("\n")
            fail(f"{name} did not start: {why}" + (f"\n{log[-600:]}" if why.endswith(":") else ""))
    first = next(iter(servers))
    if errors[first] is not None:
        raise PlacementError(f"{first}, which the others are compared with, did not start")
    return {name: server for name, server in servers.items() if errors[name] is None}


def stop(servers: Sequence[Server]) -> None:
    """End all at once: each waits for its workers."""
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(lambda server: server.stop(), servers))


def _errors(
    servers: Mapping[str, Server], at_once: int, say: Callable[[str], None]
) -> dict[str, str | None]:
    """Return why each server does not start, None of one that does.

    When this process is ended meanwhile, so are they: those that start would else be waited for.
    """
    with ThreadPoolExecutor(at_once) as pool:
        try:
            return dict(
                zip(servers, pool.map(lambda name: _error(name, servers[name], say), servers))
            )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop(list(servers.values()))
            raise


def _error(name: str, server: Server, say: Callable[[str], None], again: bool = True) -> str | None:
    try:
        server.__enter__()
    except PlacementError as error:
        if again and PORT_TAKEN.search(server.output()):
            say(f"{name} starts again: another server took a port of its")
            return _error(name, server, say, again=False)
        return str(error)
    return None
