# What editors and type checkers see of `aggregator.providers`: its table as imports. A test compares the two.

from aggregator.llm.calls import ChatCall as ChatCall
from aggregator.llm.calls import Codec as Codec
from aggregator.llm.calls import Limits as Limits
from aggregator.llm.calls import Provider as Provider
from aggregator.llm.calls import RateHeaders as RateHeaders
from aggregator.llm.calls import StreamReader as StreamReader
from aggregator.llm.calls import Target as Target
from aggregator.llm.codecs.base import Event as Event
from aggregator.llm.codecs.base import EventReader as EventReader
from aggregator.llm.codecs.base import JSONCodec as JSONCodec
from aggregator.llm.codecs.base import words as words
from aggregator.llm.codecs.openai import OpenAIChat as OpenAIChat
from aggregator.llm.names import EntraToken as EntraToken
from aggregator.llm.names import GoogleToken as GoogleToken
