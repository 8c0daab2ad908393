# What editors and type checkers see: the table of rules.py as imports. A test compares the two.

from aggregator.training.asking import Answer as Answer
from aggregator.training.asking import ask as ask
from aggregator.training.merge import LLMChoice as LLMChoice
from aggregator.training.merge import LLMMerge as LLMMerge
from aggregator.training.merge import best_of as best_of
from aggregator.training.merge import best_tried as best_tried
from aggregator.training.merge import chain as chain
from aggregator.training.merge import dedupe as dedupe
from aggregator.training.merge import identity as identity
from aggregator.training.merge import last_of as last_of
from aggregator.training.merge import majority as majority
from aggregator.training.merge import mean as mean
from aggregator.training.merge import top_k as top_k
from aggregator.training.merge import tree_merge as tree_merge
from aggregator.training.merge import without_failed as without_failed
from aggregator.training.step import UpdateRule as UpdateRule
