# What editors and type checkers see: the table of stops.py as imports. A test compares the two.

from aggregator.training.stops import Reached as Reached
from aggregator.training.stops import Stop as Stop
from aggregator.training.stops import patience as patience
from aggregator.training.stops import seconds as seconds
from aggregator.training.stops import target as target
