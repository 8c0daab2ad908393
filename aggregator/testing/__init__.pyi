# What editors and type checkers see of `aggregator.testing`: its table as imports. A test compares the two.

from aggregator.testing.fakes import FakeTransport as FakeTransport
from aggregator.testing.fakes import ScriptedModel as ScriptedModel
from aggregator.testing.fakes import error_reply as error_reply
from aggregator.testing.fakes import stream_reply as stream_reply
from aggregator.testing.fakes import suggestion as suggestion
from aggregator.testing.fakes import text_reply as text_reply
