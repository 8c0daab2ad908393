# What editors and type checkers see of `aggregator.sandbox`: its table as imports. A test compares the two.

from aggregator.sandbox.limits import Limits as Limits
from aggregator.sandbox.limits import sandboxed as sandboxed
