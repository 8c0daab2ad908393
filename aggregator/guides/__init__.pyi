# What editors and type checkers see of `aggregator.guides`: its table as imports. A test compares the two.

from aggregator.guides.exact import ExactMatch as ExactMatch
from aggregator.guides.exact import exact_match as exact_match
from aggregator.guides.judge import LLMJudge as LLMJudge
from aggregator.guides.judge import Verdict as Verdict
from aggregator.guides.numeric import NumericMatch as NumericMatch
from aggregator.guides.pattern import KeywordHints as KeywordHints
from aggregator.guides.pattern import RegexMatch as RegexMatch
