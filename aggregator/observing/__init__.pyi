# What editors and type checkers see of `aggregator.observing`: its table as imports. A test compares the two.

from aggregator.observing.configuring import configure_logging as configure_logging
from aggregator.observing.observer import ConsoleLogger as ConsoleLogger
from aggregator.observing.observer import LoggingObserver as LoggingObserver
from aggregator.observing.observer import Observer as Observer
from aggregator.observing.observer import ProgressBar as ProgressBar
from aggregator.observing.observer import TensorBoardLogger as TensorBoardLogger
from aggregator.observing.observer import WandbLogger as WandbLogger
from aggregator.observing.observer import as_observer as as_observer
from aggregator.observing.observer import from_logger as from_logger
