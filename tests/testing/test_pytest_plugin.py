"""The pytest plugin in a user's project tree."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from user_project import Model, cassettes, only

pytest_plugins = ["pytester"]
EVERY_TEST = 7


def test_a_project_records_once_and_replays_offline(project: pytest.Pytester, model: Model) -> None:
    """The first run calls the model, later ones play the cassettes, and each test has its file."""
    project.runpytest().assert_outcomes(passed=EVERY_TEST)
    asked = model.hits
    folder = "tests/unit/cassettes"
    assert cassettes(project) == [
        f"{folder}/shared/greeting.yaml",
        f"{folder}/test_router/TestGrouped.test_method.yaml",
        f"{folder}/test_router/test_async.yaml",
        f"{folder}/test_router/test_parametrised[login-].yaml",
        f"{folder}/test_router/test_parametrised[refund-late].yaml",
        f"{folder}/test_router/test_plain.yaml",
        f"{folder}/test_router/test_with_fixture.yaml",
    ]
    model.shutdown()
    project.runpytest("--cassette-mode=none", "-p", "no:randomly").assert_outcomes(passed=EVERY_TEST)
    assert model.hits == asked == 9


def test_nothing_records_in_ci_by_default(
    project: pytest.Pytester, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If CI is set, a missing cassette is an error, whatever mark or ini say; the command-line option still wins."""
    monkeypatch.setenv("CI", "true")
    only(project, "@pytest.mark.cassette(mode='all', clients='all')\ndef test_it():\n    route('x')\n")
    outcome = project.runpytest("-o", "cassette_mode=once")
    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines(["*CassetteMissError*"])
    assert (model.hits, cassettes(project)) == (0, [])
    project.runpytest("--cassette-mode=once").assert_outcomes(passed=1)
    assert cassettes(project) == ["tests/cassettes/test_one/test_it.yaml"]


def test_settings_are_read_from_the_ini_file(project: pytest.Pytester, model: Model) -> None:
    """One folder for all cassettes, clients and mode can be set in the ini file."""
    only(project, "@pytest.mark.cassette\ndef test_it():\n    route('x')\n")
    settings = ["-o", "cassette_dir=cassettes", "-o", "cassette_clients=httpx", "-o", "cassette_mode=new_episodes"]
    project.runpytest(*settings).assert_outcomes(passed=1)
    assert cassettes(project) == ["cassettes/tests/test_one/test_it.yaml"]


def test_the_network_is_refused_while_a_test_replays(project: pytest.Pytester, model: Model) -> None:
    """A connection outside the cassette is an error that names its target; other tests may connect."""
    connect = (
        "socket.create_connection(('127.0.0.1', int(os.environ['MODEL_URL'].split(':')[2].split('/')[0]))).close()"
    )
    only(
        project,
        f"@pytest.mark.cassette(clients='all')\ndef test_marked():\n    route('x')\n    {connect}\n"
        "@pytest.mark.cassette(clients='all', allowed_hosts=['127.0.0.1'])\ndef test_allowed():\n"
        f"    route('x')\n    {connect}\n"
        f"def test_other():\n    {connect}\n",
    )
    project.runpytest().assert_outcomes(passed=3)
    outcome = project.runpytest()
    outcome.assert_outcomes(passed=2, failed=1)
    outcome.stdout.fnmatch_lines(
        ["*Expected no connection, got one to '127.0.0.1'*test_marked.yaml is being replayed*"]
    )


def test_a_failed_tests_recording_is_not_kept(project: pytest.Pytester, model: Model) -> None:
    """A failing test's recording is dropped, and an existing cassette is unchanged."""
    only(
        project,
        "@pytest.mark.cassette(clients='all')\ndef test_it():\n    route('x')\n    assert os.environ.get('GOOD')\n",
    )
    project.runpytest().assert_outcomes(failed=1)
    assert cassettes(project) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOOD", "yes")
        project.runpytest().assert_outcomes(passed=1)
    kept = (project.path / "tests/cassettes/test_one/test_it.yaml").read_bytes()
    project.runpytest("--cassette-mode=all").assert_outcomes(failed=1)
    assert (project.path / "tests/cassettes/test_one/test_it.yaml").read_bytes() == kept
    assert cassettes(project) == ["tests/cassettes/test_one/test_it.yaml"]


@pytest.mark.parametrize(
    ("unplayed", "outcome", "told"),
    [("error", {"failed": 1}, True), ("report", {"passed": 1}, True), ("ignore", {"passed": 1}, False)],
)
def test_unplayed_exchanges_are_reported_or_fail_the_test(
    project: pytest.Pytester, model: Model, unplayed: str, outcome: dict[str, int], told: bool
) -> None:
    """Exchanges that a test no longer requests are listed at the end, or fail the test on request."""
    test = "@pytest.mark.cassette(clients='all')\ndef test_it():\n    route('x')\n    {}\n"
    only(project, test.format("route('y')"))
    project.runpytest().assert_outcomes(passed=1)
    only(project, test.format("pass"))
    result = project.runpytest("-o", f"cassette_unplayed={unplayed}")
    result.assert_outcomes(**outcome)
    assert ("#0.0" in result.stdout.str()) is told
    result.stdout.no_fnmatch_line("*asked nothing*")  # which the other messages have reported


def test_a_swallowed_miss_fails_the_test(project: pytest.Pytester, model: Model) -> None:
    """`except Exception` in the code under test cannot hide a miss."""
    only(
        project,
        "@pytest.mark.cassette(mode='none', clients='all')\ndef test_it():\n"
        "    try:\n        route('x')\n    except Exception:\n        pass\n",
    )
    outcome = project.runpytest()
    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines(["*CassetteMissError*"])


@pytest.mark.parametrize("argument", ["unknown=1", "'a', 'b'"])
def test_an_invalid_mark_lists_the_arguments(project: pytest.Pytester, argument: str) -> None:
    """An unknown argument is an error with the known ones, not silently ignored."""
    only(project, f"@pytest.mark.cassette({argument})\ndef test_it():\n    pass\n")
    outcome = project.runpytest()
    outcome.assert_outcomes(errors=1)
    outcome.stdout.fnmatch_lines(["*Expected @pytest.mark.cassette(name, mode, clients, *test_one.py::test_it*"])


def test_two_tests_never_share_a_default_cassette(project: pytest.Pytester, model: Model) -> None:
    """Two names that give the same file are an error with the remedy; a cassette that both name is shared."""
    only(
        project,
        "@pytest.mark.parametrize('x', ['a/b', 'a?b'])\n@pytest.mark.cassette(clients='all')\n"
        "def test_it(x):\n    route('x')\n",
    )
    outcome = project.runpytest()
    outcome.assert_outcomes(errors=2)  # both, so that neither depends on the order, or on another worker
    outcome.stdout.fnmatch_lines(["*Expected another cassette for *name one: *"])


def test_the_tape_is_a_fixture(project: pytest.Pytester, model: Model) -> None:
    """The fixture `cassette_tape` is the test's open tape."""
    only(
        project,
        "@pytest.mark.cassette(clients='all')\ndef test_it(cassette_tape):\n"
        "    route('x')\n    assert cassette_tape.recorded == 1\n",
    )
    project.runpytest().assert_outcomes(passed=1)


def test_a_run_without_pytests_cache_ended_in_an_internal_error(project: pytest.Pytester, model: Model) -> None:
    """`-p no:cacheprovider` leaves nothing for `check --orphans`, and does not affect the run."""
    only(project, "@pytest.mark.cassette\ndef test_it():\n    route('x')\n")
    outcome = project.runpytest("-p", "no:cacheprovider")
    outcome.assert_outcomes(passed=1)
    assert outcome.ret is pytest.ExitCode.OK


def test_vcr_tests_can_use_the_tape(project: pytest.Pytester, model: Model) -> None:
    """pytest-recording keeps its marks and files; with `cassette_serve_vcr` its tests play from our index."""
    pytest.importorskip("pytest_recording")
    only(
        project,
        "@pytest.mark.vcr\ndef test_it(vcr):\n    assert route('x') == 'answer 1'\n"
        "    print('class', type(vcr).__name__)\n",
    )
    stock = project.runpytest("--record-mode=once", "-rP")
    stock.assert_outcomes(passed=1)
    stock.stdout.fnmatch_lines(["class Cassette"])
    served = project.runpytest("-o", "cassette_serve_vcr=true", "-rP")
    served.assert_outcomes(passed=1)
    served.stdout.fnmatch_lines(["class ServedCassette"])
    assert model.hits == 1


HOOKS = {
    "before_record_response": "vcr.before_record_response = lambda response: response | {'body': {'string': b'X'}}",
    "filter_query_parameters": "vcr.filter_query_parameters = ['customer']",
    "matcher": "vcr.register_matcher('body', lambda a, b: True); vcr.match_on = ['body']",
    "persister": "vcr.register_persister(type(vcr.persister).__mro__[1])",
    "record_on_exception": "vcr.record_on_exception = False",
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_secrets_scrubbed_by_a_hook_were_recorded(project: pytest.Pytester, model: Model, hook: str) -> None:
    """`pytest_recording_configure` sets hooks and filters in the VCR itself: those tests stay with stock vcrpy."""
    pytest.importorskip("pytest_recording")
    (project.path / "tests/conftest.py").write_text(f"def pytest_recording_configure(config, vcr):\n    {hook}\n")
    only(
        project,
        "@pytest.mark.vcr\ndef test_it(vcr):\n"
        "    httpx.post(os.environ['MODEL_URL'] + '?customer=Jane', trust_env=False)\n"
        "    print('class', type(vcr).__name__)\n",
    )
    outcome = project.runpytest("-o", "cassette_serve_vcr=true", "--record-mode=once", "-rP")
    outcome.assert_outcomes(passed=1)
    outcome.stdout.fnmatch_lines(["class Cassette"])


def test_cassettes_of_vcr_tests_were_always_orphans(project: pytest.Pytester, model: Model) -> None:
    """Their tests have accounts too; for those left with stock vcrpy the use is unknown."""
    pytest.importorskip("pytest_recording")
    only(
        project,
        "@pytest.mark.vcr\ndef test_it():\n    route('x')\n"
        "@pytest.mark.vcr(drop_unused_requests=True)\ndef test_stock():\n    route('x')\n",
    )
    project.runpytest("-o", "cassette_serve_vcr=true", "--record-mode=once").assert_outcomes(passed=2)
    kept = json.loads((project.path / ".pytest_cache/v/aggregator/cassettes").read_text())
    folder = project.path / "tests/cassettes/test_one"
    assert kept == {
        "tests/test_one.py::test_it": {"path": f"{folder / 'test_it.yaml'}", "unplayed": [], "complete": True},
        "tests/test_one.py::test_stock": {"path": f"{folder / 'test_stock.yaml'}", "unplayed": [], "complete": False},
    }


def test_pytest_recording_replays_our_recordings(project: pytest.Pytester, model: Model) -> None:
    """The default path and the format of a marked test's cassette are the same."""
    pytest.importorskip("pytest_recording")
    only(project, "@pytest.mark.cassette(clients='all')\ndef test_it():\n    assert route('x') == 'answer 1'\n")
    project.runpytest().assert_outcomes(passed=1)
    only_path = project.path / "tests" / "test_one.py"
    only_path.write_text(only_path.read_text().replace("cassette(clients='all')", "vcr"))
    project.runpytest("--block-network").assert_outcomes(passed=1)
    assert model.hits == 1


def test_the_plugin_is_light() -> None:
    """Loading it imports nothing but pytest."""
    script = (
        "import sys, pytest; before = set(sys.modules); import aggregator.testing.pytest_plugin; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert [name for name in out.split() if name not in sys.stdlib_module_names] == ["aggregator"]


def test_hosts_are_ignored_by_the_mark_and_the_ini_file(project: pytest.Pytester, model: Model) -> None:
    """Their requests are made in every run, also while a test replays, and are in no cassette."""
    body = "def test_it():\n    assert route('x').startswith('answer')\n"
    for mark, settings in (
        ("@pytest.mark.cassette(clients='all', ignore_hosts='127.0.0.1')\n", []),
        ("@pytest.mark.cassette(clients='all', ignore_localhost=True)\n", []),
        ("@pytest.mark.cassette(clients='all')\n", ["-o", "cassette_ignore_hosts=127.0.0.1"]),
        ("@pytest.mark.cassette(clients='all')\n", ["-o", "cassette_ignore_localhost=true"]),
    ):
        only(project, mark + body)
        hits = model.hits
        for mode in ("once", "none"):
            project.runpytest(*settings, f"--cassette-mode={mode}").assert_outcomes(passed=1)
        assert (model.hits, cassettes(project)) == (hits + 2, [])
    only(project, "@pytest.mark.cassette(clients='all', ignore_hosts=None)\n" + body)
    project.runpytest("-o", "cassette_ignore_localhost=true").assert_outcomes(passed=1)
    assert cassettes(project) == ["tests/cassettes/test_one/test_it.yaml"]


def test_telemetry_failed_a_test_that_replays(project: pytest.Pytester) -> None:
    """A background thread posts to a host that is ignored by default: it is refused, and the test passes.

    Any other host makes the test fail, although the code hides the error.
    """
    for url, outcome in (
        ("https://api.openai.com/v1/traces/ingest", {"passed": 1}),
        ("https://api.example.invalid/v1", {"failed": 1}),
    ):
        only(
            project,
            "import contextlib, threading\n"
            "def post():\n    with contextlib.suppress(Exception):\n"
            f"        httpx.post({url!r}, json={{}})\n"
            "@pytest.mark.cassette(clients='all', mode='none', unplayed='ignore')\n"
            "def test_it():\n    one = threading.Thread(target=post)\n    one.start()\n    one.join()\n",
        )
        project.runpytest().assert_outcomes(**outcome)


def test_an_ignored_host_was_refused_with_an_error_that_no_client_handles(project: pytest.Pytester) -> None:
    """litellm downloads its price table at import, and continues if the network is down."""
    only(
        project,
        "import urllib.error, urllib.request\n"
        "URL = 'https://raw.githubusercontent.com/BerriAI/litellm/main/prices.json'\n"
        "@pytest.mark.cassette(clients='all', mode='none', unplayed='ignore')\n"
        "def test_it():\n    with pytest.raises(urllib.error.URLError):\n        urllib.request.urlopen(URL)\n",
    )
    project.runpytest().assert_outcomes(passed=1)


def test_the_mark_accepts_a_cassettes_options(project: pytest.Pytester, model: Model) -> None:
    """Matching, hooks and redaction are those of `cassette(...)`."""
    options = "clients='all', match_on=['method', 'path'], allow_playback_repeats=True, before_record_response=scrub"
    only(
        project,
        "def scrub(response):\n    response['body']['string'] = b'scrubbed'\n    return response\n"
        f"@pytest.mark.cassette({options})\n"
        "def test_it():\n"
        "    print(route(os.environ.get('TICKET', 'x')), route('y') if 'TICKET' in os.environ else '')\n",
    )
    project.runpytest("-s").assert_outcomes(passed=1)
    monkey = pytest.MonkeyPatch()
    monkey.setenv("TICKET", "another")
    try:
        outcome = project.runpytest("-s", "--cassette-mode=none")
    finally:
        monkey.undo()
    outcome.assert_outcomes(passed=1)
    outcome.stdout.fnmatch_lines(["*scrubbed scrubbed*"])
    assert model.hits == 1


def test_a_vcr_object_has_its_attributes_while_recording(project: pytest.Pytester, model: Model) -> None:
    """`requests`, `responses`, `play_count`, `all_played` and the length work while recording and playing."""
    pytest.importorskip("pytest_recording")
    only(
        project,
        "def state(vcr):\n"
        "    bodies = [answer['body']['string'] for answer in vcr.responses]\n"
        "    asked = [request.body for request in vcr.requests]\n"
        "    return asked, bodies, vcr.play_count, vcr.all_played, len(vcr), vcr.dirty\n"
        "@pytest.mark.vcr\n"
        "def test_it(vcr):\n"
        "    print('before', state(vcr))\n    route('x')\n"
        "    print('after', state(vcr), vcr.requests[0].headers['host'])\n"
        "    print('found', len(vcr.responses_of(vcr.requests[0])))\n",
    )
    outcome = project.runpytest("-o", "cassette_serve_vcr=true", "--record-mode=once", "-rP")
    outcome.assert_outcomes(passed=1)
    outcome.stdout.fnmatch_lines(
        [
            "before (??, ??, 0, True, 0, False)",
            "after (?b'*x*'?, ?b'answer 1'?, 0, False, 1, True) 127.0.0.1:*",
            "found 1",
        ]
    )
    outcome = project.runpytest("-o", "cassette_serve_vcr=true", "--record-mode=none", "-rP", "-k", "test_it")
    outcome.stdout.fnmatch_lines(["before (?b'*x*'?, ?b'answer 1'?, 0, False, 1, False)"])
    outcome.stdout.no_fnmatch_line("*answer 2*")


def test_a_miss_of_a_vcr_test_is_vcrpys_own(project: pytest.Pytester, model: Model) -> None:
    """A test that expects vcrpy's exception passes, and the miss is not raised again at its end."""
    pytest.importorskip("pytest_recording")
    only(
        project,
        "from vcr.errors import CannotOverwriteExistingCassetteException\n"
        "@pytest.mark.vcr\ndef test_it():\n"
        "    with pytest.raises(CannotOverwriteExistingCassetteException, match='Expected a recorded answer'):\n"
        "        route('x')\n",
    )
    project.runpytest("-o", "cassette_serve_vcr=true", "--record-mode=none").assert_outcomes(passed=1)
    assert model.hits == 0


def test_a_vcr_test_matches_by_its_own_match_on(project: pytest.Pytester, model: Model) -> None:
    """It matches as with stock vcrpy; a test with custom matchers or headers uses that."""
    pytest.importorskip("pytest_recording")
    for options, ticket, outcome in (
        ("match_on=['method', 'path']", "y", {"passed": 1}),
        ("match_on=['method', 'path', 'body']", "y", {"failed": 1}),
        ("", "y", {"passed": 1}),
        ("match_on=['headers']", "x", {"passed": 1}),
        ("allow_playback_repeats=True", "x') and route('x", {"passed": 1}),
        ("ignore_hosts=['127.0.0.1']", "never recorded", {"passed": 1}),
    ):
        only(project, f"@pytest.mark.vcr({options})\ndef test_it():\n    assert route('x')\n")
        project.runpytest("-o", "cassette_serve_vcr=true", "--record-mode=once").assert_outcomes(passed=1)
        only(project, f"@pytest.mark.vcr({options})\ndef test_it():\n    assert route('{ticket}')\n")
        found = project.runpytest("-o", "cassette_serve_vcr=true", "--record-mode=none")
        found.assert_outcomes(**outcome)
        for path in cassettes(project):
            (project.path / path).unlink()
