"""The API that users of Trace know: names, order and defaults are kept."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from aggregator import AggregatedUpdate, BasicSearchAlgorithm, DataLoader, Minibatch, evaluate

SEED: dict[Any, dict[str, Any]] = {
    AggregatedUpdate.__init__: {
        "agent": ...,
        "optimizer": ...,
        "use_asyncio": True,
        "logger": None,
        "llm": None,
        "max_tokens": 4096,
    },
    AggregatedUpdate.train: {
        "guide": ...,
        "train_dataset": ...,
        "stepsize": 0.5,
        "num_epochs": 1,
        "batch_size": 1,
        "test_dataset": None,
        "eval_frequency": 1,
        "log_frequency": None,
        "min_score": None,
        "verbose": False,
        "ensure_improvement": False,
        "improvement_threshold": 0.0,
        "save_frequency": None,
        "save_path": "checkpoints/agent.json",
        "num_threads": None,
    },
    AggregatedUpdate.forward: {"agent": ..., "x": ..., "guide": ..., "info": ..., "verbose": False},
    AggregatedUpdate.to_param_dict: {"update_dict": ...},
    AggregatedUpdate.update: {"outputs": ..., "verbose": False},
    AggregatedUpdate.construct_update_dict: {"parameters": ..., "suggestion": ..., "ignore_extraction_error": True},
    AggregatedUpdate.extract_llm_suggestion: {"response": ..., "ignore_extraction_error": True},
    DataLoader.__init__: {"dataset": ..., "batch_size": 1, "replacement": False, "shuffle": True},
    evaluate: {"agent": ..., "guide": ..., "inputs": ...},
}


@pytest.mark.parametrize("function", list(SEED), ids=lambda function: function.__qualname__)
def test_arguments_and_defaults_of_the_seed(function: Any) -> None:
    """Every argument of the seed comes first, in order and with its default; ours follow."""
    parameters = [p for name, p in inspect.signature(function).parameters.items() if name != "self"]
    expected = SEED[function]
    assert [parameter.name for parameter in parameters[: len(expected)]] == list(expected)
    found = [... if p.default is inspect.Parameter.empty else p.default for p in parameters[: len(expected)]]
    assert found == list(expected.values())


@pytest.mark.requirement("Trace's defect 4: use_asyncio did nothing")
def test_no_trainer_has_kwargs() -> None:
    """A mistyped argument is a TypeError; Trace ignored it."""
    for kind in (AggregatedUpdate, Minibatch, BasicSearchAlgorithm):
        for name in ("__init__", "train", "atrain"):
            kinds = {parameter.kind for parameter in inspect.signature(getattr(kind, name)).parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_train_and_atrain_have_one_signature() -> None:
    """Both accept the same arguments."""
    assert inspect.signature(Minibatch.train) == inspect.signature(Minibatch.atrain)


def test_our_own_defaults() -> None:
    """max_concurrency=64 and seed=0, as documented."""
    parameters = inspect.signature(AggregatedUpdate).parameters
    assert (parameters["max_concurrency"].default, parameters["seed"].default) == (64, 0)


def test_the_prompts_are_class_attributes() -> None:
    """`aggregator_system_prompt` can be read and overridden, and names the seed's sections and TERMINATE."""
    assert "#CurrentValue" in AggregatedUpdate.aggregator_system_prompt
    assert "TERMINATE" in AggregatedUpdate.aggregator_system_prompt
