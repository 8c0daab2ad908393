"""A tracker: an Observer that writes one line of CSV for each step, and what the run was and reached.

Override the events that you need, sync or async: `started`, `rollout`, `evaluation`, `step`, `finished`, `failed`. Each
gets one record, so a field that is added later breaks nothing.
"""

import csv
import sys
from typing import TextIO

from aggregator import AggregatedUpdate, LLMOptimizer, Observer, TrainingResult
from aggregator.records import Evaluation, FullStepReport, RunInfo
from aggregator.testing import ScriptedModel, suggestion


class CSVTracker(Observer):
    """Writes step, scores, decision, calls and cost."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.rows = csv.writer(file, lineterminator="\n")

    def started(self, info: RunInfo, /) -> None:
        self.rows.writerow(["step", "train", "test", "accepted", "why", "failures", "calls", "usd"])

    def evaluation(self, evaluation: Evaluation, /) -> None:
        if evaluation.step == 0:  # the baseline; later ones come with their step
            self.rows.writerow(["baseline", "", evaluation.score, "", "", len(evaluation.failures), "", ""])

    def step(self, report: FullStepReport, /) -> None:
        spent = report.usage.values()
        self.rows.writerow(
            [
                report.step,
                report.score,
                report.test_score,
                report.decision.accepted,
                report.decision.reason,
                len(report.failures),
                sum(usage.calls for usage in spent),
                round(sum(usage.cost or 0.0 for usage in spent), 6),
            ]
        )

    def finished(self, result: TrainingResult, /) -> None:
        self.rows.writerow(["best", "", max(filter(None, result.test_scores), default=None), *[""] * 5])

    def failed(self, error: BaseException, /) -> None:
        self.rows.writerow(["failed", "", "", "", f"{type(error).__name__}: {error}", "", "", ""])


def add(x: int, *, amount: int = 1) -> int:
    return x + amount


def guide(x: int, output: int, wanted: int) -> tuple[float, str]:
    return float(output == wanted), f"Expected {wanted}, got {output}."


def main() -> None:
    llm = ScriptedModel(suggestion(amount=3))
    data = [(x, x + 3) for x in range(4)]
    trainer = AggregatedUpdate(add, LLMOptimizer(llm=llm), llm=llm, observers=[CSVTracker(sys.stdout)])
    trainer.train(guide, data, batch_size=2, test_dataset=data)


if __name__ == "__main__":
    main()
