# What editors and type checkers see: the table of searches.py as imports. A test compares the two.

from aggregator.records import Candidate as Candidate
from aggregator.training.searches import beam as beam
from aggregator.training.searches import greedy as greedy
from aggregator.training.searches import pareto as pareto
from aggregator.training.searches import priority as priority
from aggregator.training.searches import sequential as sequential
from aggregator.training.step import Search as Search
