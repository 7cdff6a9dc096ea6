"""Say what happens: progress with the engine's name in front, and failures in one line."""

import os
import sys


class Failed(Exception):
    """End the script with one line."""


PREFIX = []
NO_ANSWER = "no answer from the package index"


def set_prefix(engine):
    """Put the engine's name before every line: two environments are built side by side."""
    PREFIX[:] = [f"{engine:<7} "]


def say(text):
    """Print lines of progress at once."""
    for line in text.splitlines():
        print("".join(PREFIX) + line, flush=True)


def fail(text, code):
    """Print the one line that ends the script; returns its exit code."""
    print("".join(PREFIX) + "error: " + text, file=sys.stderr)
    return code


def explain(text, doing):
    """Put a tool's output into one line that names the cause and the mend."""
    low = text.lower()
    if "no space left" in low or "os error 28" in low or "errno 28" in low:
        return f"the disk is full ({doing}): free some space and call again"
    signs = ("dns error", "name or service not known", "temporary failure in name resolution")
    signs += ("timed out", "timeout", "connection refused", "network is unreachable")
    signs += ("error sending request", "failed to establish a new connection", "connection error")
    if any(sign in low for sign in signs):
        return (
            f"{NO_ANSWER} ({doing}): check the network, or set PIP_INDEX_URL to an index within "
            "reach, and call again"
        )
    stripped = (line.strip(" │╰─▶×") for line in text.strip().splitlines())
    lines = [line for line in stripped if line]
    return "{} failed: {}".format(doing, " / ".join(lines[-3:]) or "it said nothing")


def show(path):
    """Write a path as seen from where the user stands, when it lies below."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
