"""One refused request loses its instance; only an error of every request ends a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_fakes import ScriptedModel, suggest

from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    ContextLengthError,
    LLMError,
    NotFoundError,
    PermissionDeniedError,
    QuotaError,
    TrainingError,
    ends_run,
)
from aggregator.observing.observer import Observer
from aggregator.records import RunInfo
from aggregator.training.algorithms import AggregatedUpdate
from aggregator.training.proposers import LLMOptimizer

DATA = [(f"q{i}", "no") for i in range(8)]
OWN: list[LLMError] = [
    BadRequestError("azure answered 400 (content_filter): The response was filtered", status=400),
    BadRequestError("openai answered 400 (invalid_prompt): your prompt was flagged", status=400, code="invalid_prompt"),
    BadRequestError("openai answered 400 (invalid_image): the image could not be read", status=400),
    BadRequestError("anthropic answered 413: the request is too large", status=413),
    BadRequestError("answered 422: unprocessable", status=422),
    PermissionDeniedError("openrouter answered 403: requires moderation, your input was flagged", status=403),
    ContextLengthError("prompt is too long", status=400),
    BadRequestError("azure answered 400 (content_filter): flagged: 'my billing quota, my api key'", status=400),
    NotFoundError("openai answered 404: File with id file-x not found", status=404),
    NotFoundError("openai answered 404: Previous response with id 'resp_1' not found.", status=404),
    NotFoundError("openrouter answered 404: No endpoints found that support image input", status=404),
]
SHARED: list[LLMError] = [
    AuthenticationError("answered 401", status=401),
    PermissionDeniedError("answered 403: the key may not do this", status=403),
    NotFoundError("answered 404: no such model", status=404),
    NotFoundError("openai answered 404 (model_not_found): The model `gpt-9` does not exist", status=404),
    NotFoundError("azure answered 404 (DeploymentNotFound): The API deployment does not exist", status=404),
    NotFoundError("answered 404: page not found", status=404),
    QuotaError("answered 429: insufficient_quota", status=429),
    BadRequestError("gemini answered 400: API key not valid. Please pass a valid API key.", status=400),
    BadRequestError("anthropic answered 400: Your credit balance is too low", status=400),
    BadRequestError("answered 400: x/y is not a valid model ID", status=400),
]


class Asking(Module):
    """An agent whose model refuses one input."""

    def __init__(self, error: LLMError | None) -> None:
        self.prompt = ParameterNode("Say yes.")
        self.error = error

    def forward(self, x: str) -> str:
        if self.error is not None and x == "q3":
            raise self.error
        return "no" if "no" in self.prompt.data else "yes"


def exact(x: str, output: str, info: str) -> tuple[float, str]:
    return float(output == info), "fb"


def train(agent: Asking, *, skip: Any = (), observer: Observer | None = None, **options: Any) -> Any:
    llm = ScriptedModel(lambda messages: suggest(prompt="Say no."))
    watching = [] if observer is None else [observer]
    trainer = AggregatedUpdate(agent, LLMOptimizer(llm=llm), llm=llm, skip_samples=skip, observers=watching)
    return trainer.train(exact, DATA, batch_size=2, **options)


@pytest.mark.parametrize("error", OWN, ids=str)
def test_a_refused_instance_is_lost_and_named(error: LLMError) -> None:
    """It ended the run, and every resumed one."""
    result = train(Asking(error))
    assert len(result.history) == 4
    assert [record.sample_id for record in result.failures] == [3]
    assert not ends_run(error)


@pytest.mark.parametrize("error", SHARED, ids=str)
def test_an_error_of_every_request_ends_the_run(error: LLMError) -> None:
    """The next request would get the same answer."""
    with pytest.raises(TrainingError, match=r"got an error after \d steps"):
        train(Asking(error))
    assert ends_run(error)


def test_a_refused_optimizer_call_is_a_lost_proposal() -> None:
    """One prompt of eight was flagged."""
    refused = BadRequestError("answered 400: flagged", status=400)
    llm = ScriptedModel(lambda messages: refused if "q5" in str(messages) else suggest(prompt="Say no."))

    class Shows(Asking):
        def forward(self, x: str) -> str:
            return f"yes {x}"

    result = AggregatedUpdate(Shows(None), LLMOptimizer(llm=llm), llm=llm).train(exact, DATA, batch_size=2)
    assert [(record.stage, record.sample_id) for record in result.failures] == [("proposal", 5)]


def test_a_resumed_run_can_skip_samples(tmp_path: Path) -> None:
    """A sample that ends a run can be skipped by its id; the run reports it, and its resume skips it too."""

    class Recording(Observer):
        info: RunInfo

        async def started(self, info: RunInfo) -> None:
            self.info = info

    observer = Recording()
    with pytest.raises(TrainingError):
        train(Asking(SHARED[0]), run_dir=tmp_path)
    result = train(Asking(SHARED[0]), skip=[3], run_dir=tmp_path, resume=True, observer=observer)
    assert len(result.history) == 4
    assert sorted(i for report in result.history for i in report.sample_ids) == [0, 1, 2, 4, 5, 6, 7]
    assert (result.skipped_samples, observer.info.skipped_samples) == ((3,), (3,))
    again = train(Asking(SHARED[0]), run_dir=tmp_path, resume=True)
    assert again == result


def test_a_batch_of_skipped_samples_changes_nothing() -> None:
    """Its step exists, so that a resumed run's steps keep their numbers."""
    result = train(Asking(None), skip=range(1, 8))
    assert sorted(map(len, (report.sample_ids for report in result.history))) == [0, 0, 0, 1]
    assert [len(report.update) for report in result.history if not report.sample_ids] == [0, 0, 0]


@pytest.mark.parametrize("skip", [[8], [-1], ["q3"], 3.5, "3", range(8), [True]])
def test_skip_samples_are_ids(skip: Any) -> None:
    """An invalid id is refused before anything is paid for."""
    with pytest.raises(ConfigError, match="Expected skip_samples"):
        train(Asking(None), skip=skip)
