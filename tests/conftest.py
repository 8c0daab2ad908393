"""Settings that every test relies on, however the suite was started."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

settings.register_profile("same", derandomize=True)  # the same examples in every run, here and in CI
settings.register_profile("explore")  # HYPOTHESIS_PROFILE=explore looks for new ones
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
os.environ.pop("CI", None)  # it decides the default record mode; a test that needs it sets it
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, and so do their children
