"""Other HTTP clients on our tape: their patches, installed once however many tapes are open.

vcrpy replaces classes for the whole process and gives each patch one cassette, so two cassettes in two tasks mix, and a
connection that is being made takes the patches away from every thread. Here functions are replaced, and each call
decides by its context: whether a tape serves it, and which. Connections that were made before are served as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aggregator.cassettes.patches import aiohttp, httpx, stdlib, tornado, unserved, urllib3
from aggregator.cassettes.traffic import observing, passing
from aggregator.patching import Patches

__all__ = ["observing", "passing", "patched"]

_patches = Patches(
    (*aiohttp.PATCHES, *httpx.PATCHES, *stdlib.PATCHES, *tornado.PATCHES, *urllib3.PATCHES, *unserved.PATCHES)
)


@contextmanager
def patched() -> Iterator[None]:
    """Hold the patches of every client for the time of a block; a client that is imported later is patched then.

    Nothing changes for calls outside of a tape with `clients=` and of `observing`.
    """
    _patches.hold()
    try:
        yield
    finally:
        _patches.release()
