# What editors and type checkers see: the table of gates.py as imports. A test compares the two.

from aggregator.training.gates import always as always
from aggregator.training.gates import both as both
from aggregator.training.gates import improves_on_batch as improves_on_batch
from aggregator.training.gates import improves_on_validation as improves_on_validation
from aggregator.training.gates import keeps_placeholders as keeps_placeholders
from aggregator.training.gates import leak_guard as leak_guard
from aggregator.training.gates import max_edit as max_edit
from aggregator.training.step import Check as Check
from aggregator.training.step import Gate as Gate
