"""Tell what kind of file a plan or a recorded load is, by its content alone."""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """Name what the first bytes of a file say."""

    EMPTY = "empty"
    JSON = "JSON"
    SAFETENSORS = "safetensors"
    TORCH = "torch's zip"
    TEXT = "other text"
    BINARY = "unknown bytes"


def kind_of(content: bytes) -> Kind:
    """Tell the kind of a file.

    A safetensors file begins with the eight bytes of its header's length, of which the first may
    look like JSON's, and the header.
    """
    if not content:
        return Kind.EMPTY
    if content[:2] == b"PK":
        return Kind.TORCH
    like_json = content.lstrip()[:1] in (b"{", b"[")
    whole = 8 + int.from_bytes(content[:8], "little") <= len(content)
    if content[8:9] == b"{" and (whole or not like_json):
        return Kind.SAFETENSORS
    if like_json:
        return Kind.JSON
    return Kind.BINARY if b"\0" in content[:64] else Kind.TEXT
