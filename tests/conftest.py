"""Settings that every test relies on, however the suite was started."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# Hypothesis's own limits on time would be timed assertions, which fail on a busy machine.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", UNTIMED, derandomize=True)  # the same examples in every run, here and in CI
settings.register_profile("explore", UNTIMED)  # HYPOTHESIS_PROFILE=explore looks for new ones
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
os.environ.pop("CI", None)  # it decides the default record mode; a test that needs it sets it
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, and so do their children
