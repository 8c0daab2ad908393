"""Our algorithm as an engine of GEPA's `optimize_anything`; engines came after gepa 0.1.4, the latest release."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregator import LLM
from aggregator.errors import ConfigError, TrainingWarning
from aggregator.simulation import SimulatedModel

pytest.importorskip("gepa.oa.registry", reason="engines of optimize_anything came after gepa 0.1.4")
host: Any = pytest.importorskip("aggregator.hosts.gepa_engine")
anything: Any = pytest.importorskip("gepa.optimize_anything")

pytestmark = [  # GEPA's server leaves its socket open
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROWS = [
    {"id": "a", "ticket": "do you sell lamps", "team": "sales"},
    {"id": "b", "ticket": "the invoice is wrong", "team": "billing"},
    {"id": "c", "ticket": "where is my parcel", "team": "shipping"},
    {"id": "d", "ticket": "a refund for the invoice", "team": "billing"},
]
SEED = "If no rule applies, answer sales."


@pytest.fixture
def llm() -> Iterator[LLM]:
    with SimulatedModel(seed=1, wrong_rate=0.0) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        yield LLM("openai/simulated-1", base_url=server.base_url, api_key="simulated")


class Evaluator:
    """Scores a prompt by the simulated student, and counts its calls."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.calls = llm, 0

    def __call__(self, candidate: Any, example: dict[str, str]) -> tuple[float, dict[str, str]]:
        self.calls += 1
        text = candidate if isinstance(candidate, str) else candidate["rules"]
        said = self.llm([{"role": "system", "content": text}, {"role": "user", "content": example["ticket"]}]).text
        return float(said == example["team"]), {"feedback": f"Expected: {example['team']}"}


def run(
    llm: LLM, tmp_path: Path, seed: Any = SEED, max_evals: int | None = 200, **engine: Any
) -> tuple[Any, Evaluator]:
    evaluator = Evaluator(llm)
    host.register()
    config = anything.OptimizeAnythingConfig(
        engine="aggregated_update",
        max_evals=max_evals,
        output_dir=tmp_path / "out",
        stop_at_score=1.0,
        engine_config={"model": llm, **engine},
    )
    return anything.optimize_anything(seed, evaluator=evaluator, dataset=ROWS, config=config), evaluator


def test_optimize_anything_improves_a_text_by_our_engine(llm: LLM, tmp_path: Path) -> None:
    result, evaluator = run(llm, tmp_path)
    assert "->" in result.best_candidate
    assert result.best_score == 1.0
    assert result.total_evals == evaluator.calls


def test_a_candidate_of_components_keeps_them(llm: LLM, tmp_path: Path) -> None:
    """A dict of texts stays a dict with the same keys."""
    result, _ = run(llm, tmp_path, {"rules": SEED})
    assert "->" in result.best_candidate["rules"]


def test_the_same_seed_gives_the_same_candidate(llm: LLM, tmp_path: Path) -> None:
    runs = [run(llm, tmp_path / name)[0].best_candidate for name in ("a", "b")]
    assert runs[0] == runs[1]


def test_the_servers_budget_of_evaluations_is_respected(llm: LLM, tmp_path: Path) -> None:
    result, evaluator = run(llm, tmp_path, max_evals=6)
    assert evaluator.calls == 6
    assert result.best_candidate


def test_unknown_options_and_a_missing_seed_are_refused(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Expected engine_config with model, .*got 'modle'"):
        run(llm, tmp_path, modle="x")
    with pytest.raises(ConfigError, match="Expected a seed_candidate"):
        run(llm, tmp_path, None)
