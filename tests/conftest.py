"""What every test may rely on, however the suite was started."""

from __future__ import annotations

import os
import signal

os.environ.pop("CI", None)  # it decides the default record mode; a test that means it sets it
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, their children too
