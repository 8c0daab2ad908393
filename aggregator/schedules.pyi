# What editors and type checkers see: the table of schedules.py as imports. A test compares the two.

from aggregator.training.schedules import Schedule as Schedule
from aggregator.training.schedules import constant as constant
from aggregator.training.schedules import cosine as cosine
from aggregator.training.schedules import linear as linear
