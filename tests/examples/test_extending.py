"""The files of `examples/extending` are short, use public names only, and run: users copy them."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import aggregator
from aggregator import ParameterNode, Proposal, Rollout, Sample, Step, portal
from aggregator.errors import ConfigError, RateLimitError
from aggregator.providers import ChatCall, Target
from aggregator.records import Candidate, HTTPReply, RolloutTask
from aggregator.testing import ScriptedModel, suggestion

FOLDER = Path(__file__).parents[2] / "examples" / "extending"
FILES = sorted(FOLDER.glob("*.py"))
MAX_LINES = 79


def loaded(name: str) -> ModuleType:
    """Import an example as a module, without running its main part."""
    spec = importlib.util.spec_from_file_location(f"extending_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def private_names(path: Path) -> list[str]:
    """Return what a file uses below the library's root files: deeper modules, and names with an underscore."""
    root = Path(aggregator.__file__).parent
    faces = {"aggregator", *(f"aggregator.{file.stem}" for file in root.glob("*.py")), "aggregator.testing"}
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "aggregator":
            module = node.module or ""
            found += [] if module in faces else [module]
            found += [f"{module}.{alias.name}" for alias in node.names if alias.name.startswith("_")]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("aggregator.")]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            found.append(node.attr)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_example_is_short_and_uses_public_names_only(path: Path) -> None:
    """It has fewer than 80 lines, no module below the package's root files, and no name with an underscore."""
    assert path.read_text(encoding="utf-8").count("\n") <= MAX_LINES
    assert private_names(path) == []


KINDS = ["executor", "function_agent", "optimizer", "provider", "rule", "search", "tracker"]

SHOWN = {
    "executor": "amount = 3",
    "function_agent": "score 0.00 -> 1.00 with {'words': 3, 'ending': ' …'}",
    "optimizer": "scores [0.0, 1.0] for 3 calls: HEY!!!",
    "rule": "{'instruction': 'Answer briefly and politely.'} in 1 call of the rule",
    "search": "step 1: took, 0.333333 -> 0.25 at temperature 0.40",
    "tracker": "0,0.0,1.0,True,always,0,2,0.2",
}


def test_there_is_an_example_of_each_part() -> None:
    """Seven files, each of them in the table of docs/extending.md."""
    assert [path.stem for path in FILES] == KINDS
    page = (FOLDER.parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    assert [name for name in KINDS if f"| `{name}.py`" not in page] == []


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    """It runs offline, in its own process, as a user would start it; its output shows the effect of its part."""
    command = [sys.executable, "-W", "error", str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    assert SHOWN[name] in done.stdout.splitlines()
    assert list(tmp_path.iterdir()) == []


def test_the_rule_makes_no_unnecessary_call() -> None:
    """For one proposal, or a stepsize of 0, no model is called."""
    model = ScriptedModel(suggestion(instruction="merged"))
    rule, agent = loaded("rule"), ParameterNode("now", name="instruction")
    editor, (one, other) = rule.Editor(model), [Proposal(values={"instruction": text}) for text in ("a", "b")]
    step = Step(values={"instruction": "now"}, parameters=[agent])
    assert portal.call(editor, [one], step) == [one]
    assert portal.call(editor, [one, other], Step(stepsize=0)) == []
    assert model.asked == []
    (merged,) = portal.call(editor, [one, other], step)
    assert (merged.values, merged.support, len(model.asked)) == ({"instruction": "merged"}, 2, 1)


def test_the_search_is_the_same_in_every_run() -> None:
    """Its randomness depends on the run's seed and the step's number only."""
    annealing = loaded("search").Annealing(temperature=1.0)
    current, worse = (
        Candidate(id=name, values={}, scores={"0": (score, 1)}) for name, score in [("a", 1.0), ("b", 0.5)]
    )
    steps = [Step(number=number, seed=7, samples=[Sample(0, None)]) for number in range(30)]
    found = [annealing.choose([current], [worse], step)[1].accepted for step in steps]
    assert found == [annealing.choose([current], [worse], step)[1].accepted for step in steps]
    assert 0 < sum(found[:10]) < 10
    assert sum(found[20:]) == 0


def test_the_executor_raises_the_earliest_error_after_work_in_flight() -> None:
    """The Protocol requires it: results in order, and an error only once the other tasks have ended."""
    ended: list[int] = []

    class Work:
        agent = guide = None

        async def __call__(self, task: RolloutTask) -> Rollout:
            await asyncio.sleep(0.01 * (3 - task.sample.id))
            ended.append(task.sample.id)
            if task.sample.x:
                raise ConfigError(f"number {task.sample.id}")
            return Rollout(sample_id=task.sample.id)

    executor = loaded("executor").Threads(4)
    tasks = [RolloutTask(sample=Sample(i, None)) for i in range(4)]
    assert [one.sample_id for one in portal.call(executor.map, Work(), tasks)] == [0, 1, 2, 3]
    ended.clear()
    failing = [RolloutTask(sample=Sample(i, i in (1, 2))) for i in range(4)]
    with pytest.raises(ConfigError, match="number 1"):
        portal.call(executor.map, Work(), failing)
    assert sorted(ended) == [0, 1, 2, 3]
    assert portal.call(executor.map, Work(), []) == []


def test_a_private_name_is_found(tmp_path: Path) -> None:
    """The check above finds deep imports, private imports and private attributes."""
    path = tmp_path / "example.py"
    path.write_text("from aggregator.llm.client import LLM\nfrom aggregator import _face\nLLM._line\n")
    assert private_names(path) == ["aggregator.llm.client", "aggregator._face", "_line"]


ANSWER = b"""{"id": "c-1", "finish_reason": "%s", "message": {"role": "assistant", "content": [{"type": "text",
"text": "Bern"}]}, "usage": {"billed_units": {"input_tokens": 5}, "tokens": {"input_tokens": 8, "output_tokens": 2}}}"""
STREAM = b"""event: message-start
data: {"type": "message-start", "id": "c-1", "delta": {"message": {"role": "assistant"}}}

event: content-delta
data: {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": "Be"}}}}

event: content-delta
data: {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": "rn"}}}}

event: message-end
data: {"type": "message-end", "delta": {"finish_reason": "COMPLETE", "usage": {"tokens": {"input_tokens": 8}}}}

"""


def test_the_provider_encodes_and_decodes() -> None:
    """Options are sent under the API's names; finish reasons, tokens, errors and streams are read."""
    codec = loaded("provider").provider.codec(
        Target(provider="cohere", model="command-a", base_url="https://api.cohere.com", api_key="k")
    )
    messages = ({"role": "user", "content": "The capital of Switzerland?"},)
    call = ChatCall(model="command-a", messages=messages, top_p=0.5, stop=("!",), extra={"k": 3})
    request = codec.encode(call)
    assert request.url == "https://api.cohere.com/v2/chat"
    assert request.headers["authorization"] == "Bearer k"
    assert request.body == (
        b'{"model":"command-a","messages":[{"role":"user","content":"The capital of Switzerland?"}],'
        b'"p":0.5,"stop_sequences":["!"],"stream":false,"k":3}'
    )
    for word, reason in [("COMPLETE", "stop"), ("MAX_TOKENS", "length"), ("ERROR_TOXIC", "error")]:
        completion = codec.decode(HTTPReply(status=200, body=ANSWER % word.encode(), headers={}), call)
        assert (completion.text, completion.finish_reason, completion.usage.input_tokens) == ("Bern", reason, 8)
    error = codec.error(HTTPReply(status=429, body=b'{"message": "slow down"}', headers={"retry-after": "2"}))
    assert (type(error), error.retry_after) == (RateLimitError, 2.0)
    reader = codec.stream(call)
    assert [text for i in range(0, len(STREAM), 7) for text in reader.feed(STREAM[i : i + 7])] == ["Be", "rn"]
    whole = reader.finish(HTTPReply(status=200, body=STREAM, headers={}))
    assert (whole.text, whole.finish_reason, whole.usage.input_tokens) == ("Bern", "stop", 8)


def test_the_provider_is_found_through_its_entry_point(tmp_path: Path) -> None:
    """In an installed package `cohere/...` is a valid name, with retries, budget and price."""
    info = tmp_path / "cohere-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cohere\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[aggregator.providers]\ncohere = provider:provider\n")
    script = f"""
        from aggregator import LLM, Budget, Price
        from aggregator.testing import FakeTransport, error_reply
        from aggregator.records import HTTPReply
        answer = HTTPReply(status=200, body={ANSWER % b"COMPLETE"!r}, headers={{}})
        transport = FakeTransport(error_reply(429, headers={{"retry-after": "0"}}), answer)
        price = {{"cohere/command-a": Price(input=1.0, output=1.0)}}
        llm = LLM("cohere/command-a", transport=transport, budget=Budget(usd=1), prices=price)
        print(llm(messages="Hi").text, len(transport.requests), llm.budget.spent.tokens)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={"PYTHONPATH": f"{tmp_path}:{FOLDER}", "CO_API_KEY": "k"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("Bern 2 10\n", "")
