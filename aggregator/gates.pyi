# What editors and type checkers see: the table of gates.py as imports. A test compares the two.

from aggregator.training.decisions import Check as Check
from aggregator.training.decisions import Gate as Gate
from aggregator.training.gates import always as always
from aggregator.training.gates import both as both
from aggregator.training.gates import improves_on_batch as improves_on_batch
from aggregator.training.gates import improves_on_validation as improves_on_validation
