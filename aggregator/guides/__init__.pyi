# What editors and type checkers see of `aggregator.guides`: its table as imports. A test compares the two.

from aggregator.guides.calling import metric as metric
from aggregator.guides.judge import LLMJudge as LLMJudge
from aggregator.guides.judge import Verdict as Verdict
from aggregator.guides.matching import ExactMatch as ExactMatch
from aggregator.guides.matching import KeywordHints as KeywordHints
from aggregator.guides.matching import NumericMatch as NumericMatch
from aggregator.guides.matching import RegexMatch as RegexMatch
from aggregator.guides.matching import exact_match as exact_match
from aggregator.records import Scores as Scores
