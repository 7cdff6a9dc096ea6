"""Read what a server's log says of experts that moved, of fingerprints and of ports.

The engines' own rebalancing reports how often and how long, ours also how much: what vLLM and
SGLang move by themselves they do not say.
"""

from __future__ import annotations

import re

EXCHANGED = re.compile(
    r"exchanged experts of \d+ layers in ([\d.]+) s \(\d+ chunks of at most ([\d.]+) s\): ([\d.]+) "
    r"MB in"
)
VERIFIED = re.compile(r"verified \d+ slots .*?in ([\d.]+) s")
ENGINE = {
    "vllm": re.compile(r"Rearranged experts (?!.*profile).*?in ([\d.]+) s"),
    "sglang": re.compile(r"(?:EP|DP)0\b.*\[EPLBManager\] rebalance end(?: time=([\d.]+)s)?"),
}
"""The first rank's lines; SGLang leaves the time out where it rebalances in chunks of layers."""
DECIDED = re.compile(r"(?:EP|DP)0\b.*expert rebalance (accepted|declined)")
"""Every rank tells the same decision: the first one's lines count."""
PORT_TAKEN = re.compile(
    r"EADDRINUSE|address already in use|next\(rendezvous_iterator\)|_port at \d+ is not available",
    re.IGNORECASE,
)
"""What an engine says whose port is taken.

Engines look for free ports and use them seconds later: another server that starts at the same time
can take one in between.
"""


def moved(text: str, engine: str, ready: int = 0) -> dict[str, float]:
    """Count and time what moved in one server, over all ranks that wrote to its log.

    Args:
        text: the log.
        engine: ``vllm`` or ``sglang``.
        ready: characters of it from before the server answered: experts that moved until then made
            no request wait.

    Returns:
        ``accepted`` and ``declined``: rebalances that our planner proposed; ``exchanges`` and
        ``moved_bytes``, received by all ranks; ``exchange_ms`` and ``chunk_ms``, the longest;
        ``engine_rebalances`` and ``engine_ms``, the engine's own lines and the longest of them;
        ``verify_ms``, the longest, also of those at the start.
    """
    verified = [float(seconds) for seconds in VERIFIED.findall(text)]
    text = text[ready:]
    decisions = DECIDED.findall(text)
    ours = [tuple(map(float, found)) for found in EXCHANGED.findall(text)]
    own = [float(seconds or 0) for seconds in ENGINE[engine].findall(text)]
    return {
        "accepted": decisions.count("accepted"),
        "declined": decisions.count("declined"),
        "exchanges": len(ours),
        "moved_bytes": sum(megabytes for _, _, megabytes in ours) * 1e6,
        "exchange_ms": 1e3 * max((seconds for seconds, _, _ in ours), default=0.0),
        "chunk_ms": 1e3 * max((chunk for _, chunk, _ in ours), default=0.0),
        "engine_rebalances": len(own),
        "engine_ms": 1e3 * max(own, default=0.0),
        "verify_ms": 1e3 * max(verified, default=0.0),
    }


def in_words(found: dict[str, float]) -> str:
    """Describe it in one line; empty when nothing moved and nothing was compared."""
    parts = []
    if found["accepted"] or found["declined"]:
        parts.append(f"rebalances {found['accepted']} accepted, {found['declined']} declined")
    if found["exchanges"]:
        parts.append(
            f"{found['moved_bytes'] / 1e6:.1f} MB moved, longest exchange "
            f"{found['exchange_ms']:.1f} ms, chunk {found['chunk_ms']:.1f} ms"
        )
    if found["engine_rebalances"]:
        longest = f", longest {found['engine_ms']:.0f} ms" if found["engine_ms"] else ""
        parts.append(f"{found['engine_rebalances']} rebalances told by the engine{longest}")
    if found["verify_ms"]:
        parts.append(f"fingerprints at most {found['verify_ms']:.0f} ms")
    return "; ".join(parts)
