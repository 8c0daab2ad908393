# What editors and type checkers see: the table of optimizers.py as imports. A test compares the two.

from aggregator.training.asking import Answer as Answer
from aggregator.training.asking import ask as ask
from aggregator.training.learning import LearnedUpdate as LearnedUpdate
from aggregator.training.learning import apropose_from as apropose_from
from aggregator.training.learning import propose_from as propose_from
from aggregator.training.learning import read_records as read_records
from aggregator.training.prompts import Layout as Layout
from aggregator.training.proposers import LLMOptimizer as LLMOptimizer
from aggregator.training.proposers import OPROOptimizer as OPROOptimizer
from aggregator.training.proposers import TextGradOptimizer as TextGradOptimizer
from aggregator.training.proposers import Variation as Variation
from aggregator.training.proposers import alternatives as alternatives
from aggregator.training.proposers import experts as experts
from aggregator.training.proposers import refine as refine
from aggregator.training.proposers import seeds as seeds
from aggregator.training.proposers import temperatures as temperatures
from aggregator.training.step import Optimizer as Optimizer
