# What editors and type checkers see of `aggregator.llm`: its table as imports. A test compares the two.

from aggregator.llm.budget import Budget as Budget
from aggregator.llm.budget import Estimate as Estimate
from aggregator.llm.budget import estimate as estimate
from aggregator.llm.client import LLM as LLM
from aggregator.llm.ledger import Price as Price
from aggregator.llm.messages import Image as Image
from aggregator.llm.models import as_model as as_model
