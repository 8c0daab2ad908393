"""The outcome of a test decides whether its recording is kept, and what its account says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from user_project import Model, cassettes, only

pytest_plugins = ["pytester"]
BREAKING = """
import unittest
BREAK = os.environ.get("BREAK")
pytestmark = pytest.mark.cassette(clients="all")

class TestCase(unittest.TestCase):
    def test_fails(self):
        route("one")
        if BREAK: self.fail("broken")
    def test_skips(self):
        route("one")
        if BREAK: self.skipTest("broken")
    def test_has_subtests(self):
        route("one")
        for i in range(2):
            with self.subTest(i=i):
                self.assertTrue(i or not BREAK)

@pytest.fixture
def needed():
    yield route("setup")
    if BREAK == "raise": raise RuntimeError("broken")

@pytest.fixture
def broken(needed):
    if BREAK: raise RuntimeError("broken")

@pytest.fixture
def skipping(needed):
    if BREAK: pytest.skip("broken")

def test_setup_fails(broken): pass
def test_setup_skips(skipping): pass
def test_subtests(subtests):
    route("one")
    for i in range(2):
        with subtests.test(i=i):
            assert i or not BREAK
def test_strict_xpass(request):
    route("one")
    if BREAK: request.applymarker(pytest.mark.xfail(strict=True))
"""


def accounts(pytester: pytest.Pytester) -> dict[str, Any]:
    """Return the accounts that the run left for `aggregator cassette`, by test name."""
    kept = json.loads((pytester.path / ".pytest_cache/v/aggregator/cassettes").read_text())
    return {test.rpartition("::")[2]: account for test, account in kept.items()}


def test_a_failing_test_replaced_a_good_cassette(
    project: pytest.Pytester, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test that fails or is skipped, including unittest's and subtests, records nothing and destroys nothing."""
    only(project, BREAKING)
    monkeypatch.setenv("BREAK", "yes")
    assert project.runpytest().ret == pytest.ExitCode.TESTS_FAILED
    assert project.runpytest("--setup-only").ret == pytest.ExitCode.TESTS_FAILED
    assert cassettes(project) == []
    monkeypatch.delenv("BREAK")
    project.runpytest().assert_outcomes(passed=7)
    kept = {path: (project.path / path).read_bytes() for path in cassettes(project)}
    assert len(kept) == 7
    monkeypatch.setenv("BREAK", "yes")
    project.runpytest("--cassette-mode=all")
    assert {path: (project.path / path).read_bytes() for path in cassettes(project)} == kept
    assert not any(account["complete"] for account in accounts(project).values())


def test_ctrl_c_in_a_fixture_kept_an_incomplete_recording(project: pytest.Pytester, model: Model) -> None:
    """An interrupted test has not passed, whatever its fixtures did before."""
    only(
        project,
        "@pytest.fixture\ndef asks():\n    route('x')\n    raise KeyboardInterrupt\n"
        "@pytest.mark.cassette(clients='all')\ndef test_it(asks): pass\n",
    )
    assert project.runpytest(no_reraise_ctrlc=True).ret == pytest.ExitCode.INTERRUPTED
    assert (model.hits, cassettes(project)) == (1, [])


def test_a_miss_in_setup_was_reported_twice(project: pytest.Pytester, model: Model) -> None:
    """There is one error, at setup."""
    only(
        project,
        "@pytest.fixture\ndef asks():\n    route('x')\n"
        "@pytest.mark.cassette(clients='all', mode='none')\ndef test_it(asks): pass\n",
    )
    project.runpytest().assert_outcomes(errors=1)


def test_a_fixture_could_not_make_calls_at_its_end(project: pytest.Pytester, model: Model) -> None:
    """The cassette is open until the last fixture is done; a miss that is swallowed there is reported."""
    only(
        project,
        "@pytest.fixture\ndef closing():\n    yield\n    try: route(os.environ.get('BYE', 'bye'))\n"
        "    except Exception: pass\n"
        "@pytest.mark.cassette(clients='all')\ndef test_it(closing):\n    route('x')\n",
    )
    project.runpytest().assert_outcomes(passed=1)
    model.shutdown()
    project.runpytest().assert_outcomes(passed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BYE", "tschau")
        outcome = project.runpytest()
    outcome.assert_outcomes(passed=1, errors=1)
    outcome.stdout.fnmatch_lines(["*CassetteMissError: Expected a recorded answer*"])
    assert model.hits == 2


def test_an_error_hidden_by_a_failing_test_is_reported(project: pytest.Pytester, model: Model) -> None:
    """An agent that answers "sorry" for every error made its test fail without a visible reason."""
    only(
        project,
        "def agent(url):\n    try: return httpx.post(url, trust_env=False).text\n    except Exception: return 'sorry'\n"
        "@pytest.mark.cassette(clients='all')\n"
        "def test_missed(): assert agent('http://model.invalid/miss') == 'shipping'\n"
        "@pytest.mark.cassette\n"
        "def test_refused(): assert agent('http://model.invalid/refusal') == 'shipping'\n",
    )
    outcome = project.runpytest("--cassette-mode=none")
    outcome.assert_outcomes(failed=2)
    outcome.stdout.fnmatch_lines(
        [
            "*what the cassette refused*",
            "CassetteMissError: Expected a recorded answer to POST http://model.invalid/miss *",
            "*what the cassette refused*",
            "CassetteError: Expected no connection, got one to 'model.invalid': *",
        ]
    )


def test_a_failing_run_called_needed_exchanges_unplayed(
    project: pytest.Pytester, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account of a test that stops halfway is incomplete, and names nothing to drop."""
    only(
        project,
        "@pytest.mark.cassette(clients='all')\ndef test_it():\n"
        "    route('x')\n    assert 'BREAK' not in os.environ\n    route('y')\n",
    )
    project.runpytest().assert_outcomes(passed=1)
    assert accounts(project)["test_it"] | {"path": ""} == {
        "path": "",
        "unplayed": [],
        "complete": True,
        "rule": "report",
        "idle": False,
    }
    monkeypatch.setenv("BREAK", "yes")
    project.runpytest().assert_outcomes(failed=1)
    assert [accounts(project)["test_it"][name] for name in ("complete", "unplayed")] == [False, []]


def test_a_run_of_some_tests_removed_the_others_accounts(project: pytest.Pytester, model: Model) -> None:
    """Accounts of tests that were not selected are kept, those of deleted tests are not."""
    tests = {
        name: f"@pytest.mark.cassette('both', clients='all')\ndef test_{name}():\n    route('{name}')\n"
        for name in ("a", "b")
    }
    only(project, tests["a"] + tests["b"])
    project.runpytest("-k", "test_a").assert_outcomes(passed=1, deselected=1)
    assert {name: account["complete"] for name, account in accounts(project).items()} == {
        "test_a": True,
        "test_b": False,
    }
    outcome = project.runpytest("--cassette-mode=new_episodes")
    outcome.assert_outcomes(passed=2)
    outcome.stdout.no_fnmatch_line("*unplayed*")
    whole = accounts(project)
    assert [len(whole[name]["unplayed"]) for name in ("test_a", "test_b")] == [0, 1]
    outcome = project.runpytest("tests/test_one.py::test_b")
    outcome.stdout.no_fnmatch_line("*unplayed*")
    assert (accounts(project)["test_a"], len(accounts(project))) == (whole["test_a"] | {"unplayed": []}, 2)
    only(project, tests["b"] + "def test_a(): pass\n")
    outcome = project.runpytest()
    outcome.stdout.fnmatch_lines(["*test_b left 1 recorded exchange unplayed*"])
    assert list(accounts(project)) == ["test_b"]
    only(project, "def test_a(): pass\n")
    project.runpytest().assert_outcomes(passed=1)
    assert accounts(project) == {}


@pytest.mark.parametrize("mode", ["once", "all"])
def test_tests_that_share_a_cassette_overwrote_each_other(
    project: pytest.Pytester, model: Model, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first test of a session re-records a shared cassette, the others add to it; all replay from it."""
    only(
        project,
        "@pytest.mark.cassette('shared', clients='all')\n@pytest.mark.parametrize('x', ['a', 'b', 'c'])\n"
        "def test_it(x):\n    print(route(x))\n    print(route('same'))\n",
    )
    if mode == "all":
        project.runpytest("-k", "a]").assert_outcomes(passed=1, deselected=2)
    outcome = project.runpytest(f"--cassette-mode={mode}")
    outcome.assert_outcomes(passed=3)
    outcome.stdout.no_fnmatch_line("*unplayed*")
    asked = model.hits
    assert asked == (6 if mode == "all" else 4)  # the second test's "same" is what the first has recorded
    monkeypatch.setenv("CI", "true")
    outcome = project.runpytest()
    outcome.assert_outcomes(passed=3)
    outcome.stdout.no_fnmatch_line("*unplayed*")
    assert model.hits == asked


def test_tests_that_bypassed_their_cassette_passed_silently(project: pytest.Pytester, model: Model) -> None:
    """Threads, and loops with an older context, use the cassette; a mark without any call is named."""
    only(
        project,
        """
import unittest
from concurrent.futures import ThreadPoolExecutor
from aggregator import LLM
pytestmark = pytest.mark.cassette(clients="all")

class TestAsync(unittest.IsolatedAsyncioTestCase):
    async def test_isolated(self): await aroute("isolated")

@pytest.fixture(scope="module")
def anyio_backend(): return "asyncio"
@pytest.fixture(scope="module")
async def runner(anyio_backend): return 1
@pytest.mark.anyio
async def test_anyio(runner): await aroute("anyio")

def test_threads():
    with ThreadPoolExecutor(2) as pool: assert list(pool.map(route, "ab"))

@pytest.mark.cassette(clients=["aiohttp"])
def test_past(): route("past")
@pytest.mark.cassette(clients=["aiohttp"], unplayed="ignore")
def test_known(): route("past")
""",
    )
    outcome = project.runpytest("-o", "asyncio_mode=strict")
    outcome.assert_outcomes(passed=5)
    outcome.stdout.fnmatch_lines(["1 passed test with a cassette asked nothing *: tests/test_one.py::test_past; *"])
    outcome.stdout.no_fnmatch_line("*test_known*")
    asked = model.hits
    outcome = project.runpytest("-o", "asyncio_mode=strict", "-k", "isolated or anyio or threads")
    outcome.assert_outcomes(passed=3, deselected=2)
    assert model.hits == asked == 6


def test_precedence_and_validation_of_marks(project: pytest.Pytester, model: Model) -> None:
    """The mark of a `pytest.param` wins; names and hosts of a wrong type are errors; long names fit."""
    only(
        project,
        """
@pytest.mark.cassette("outer", clients="all")
@pytest.mark.parametrize("x", [pytest.param("a", marks=pytest.mark.cassette("inner"))])
def test_param(x): route(x)

@pytest.mark.cassette(clients="all")
@pytest.mark.parametrize("x", ["文" * 96])
def test_long(x): route(x)

@pytest.mark.cassette(os)
def test_module(): pass
@pytest.mark.cassette(clients=None)
def test_none(): pass
""",
    )
    escaping = "disable_test_id_escaping_and_forfeit_all_rights_to_community_support"
    outcome = project.runpytest("-o", f"{escaping}=true")
    outcome.assert_outcomes(passed=2, errors=2)
    outcome.stdout.fnmatch_lines(
        ["*Expected a cassette's name as text, got <module*", "*Expected clients as text or a list of texts, got None*"]
    )
    inner, long = cassettes(project)
    assert inner == "tests/cassettes/test_one/inner.yaml"
    assert len(long.rpartition("/")[2].encode()) <= 160
