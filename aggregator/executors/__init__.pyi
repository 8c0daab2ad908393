# What editors and type checkers see of `aggregator.executors`: its table as imports. A test compares the two.

from aggregator.executors.local import LocalExecutor as LocalExecutor
from aggregator.executors.process import ProcessExecutor as ProcessExecutor
