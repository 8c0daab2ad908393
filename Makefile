# Each target makes .venv and installs what it needs; an unchanged pyproject.toml installs nothing the second time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-long test-peers test-vcrpy test-frameworks test-peer-suites test-trace test-data test-editors check format bench record wheel clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "aggregator needs Python 3.11 or newer; call make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.runtime

demo: $(VENV)/.runtime ## Train the demo agent from its recorded cassette, offline
	$(BIN)/aggregator demo

test: $(VENV)/.dev ## Run the test suite: no network, no key
	$(BIN)/python -m pytest -q -n 3 --dist loadfile -m "not long and not peers"

test-long: $(VENV)/.dev ## Run the sweeps that take minutes
	$(BIN)/python -m pytest -q -m "long"

test-peers: $(VENV)/.dev ## Run the client against real servers on loopback (installs and builds them once, outside this folder)
	$(BIN)/python tests/peers/install_peers.py
	$(BIN)/python -m pytest -q -m "peers and not long" tests/peers

test-vcrpy: ## Run the tests of vcrpy's formats with the oldest supported vcrpy and with the newest
	$(PYTHON) tests/environments.py vcrpy-oldest vcrpy-newest
	for name in vcrpy-oldest vcrpy-newest; do \
	  $(PYTHON) tests/environments.py --run $$name -- -c 'import importlib.metadata as m; print("vcrpy", m.version("vcrpy"))' && \
	  $(PYTHON) tests/environments.py --run $$name -- -m pytest -q -p no:cacheprovider \
	    tests/cassettes/test_layouts.py tests/cassettes/test_foreign.py tests/testing/test_pytest_plugin.py || exit 1; \
	done

test-trace: ## Run Trace's own optimizers through the adapter, in an environment of its own
	LITELLM_LOCAL_MODEL_COST_MAP=True $(PYTHON) tests/environments.py --run trace -- \
	  -m pytest -q -p no:cacheprovider tests/adapters/test_trace.py tests/adapters/test_trace_real.py

test-data: ## Run the tests of data sets with pandas and Hugging Face's datasets, in an environment of their own
	$(PYTHON) tests/environments.py --run data -- \
	  -m pytest -q -p no:cacheprovider tests/training/test_batches.py tests/training/test_resume_checks.py

test-frameworks: $(VENV)/.dev ## Run real SDKs and frameworks against loopback servers; fills the table of docs/frameworks.md
	$(PYTHON) tests/environments.py sdks litellm agents clients-oldest
	$(PYTHON) tests/frameworks/matrix.py
	$(BIN)/python tests/frameworks/reach.py --write

test-peer-suites: ## Run the suites of vcrpy and pytest-recording with cassettes of ours (fetched once, outside this folder)
	$(PYTHON) tests/peer_suites/run.py

test-editors: ## Check completion under Jedi and a user's program under Pyright, in an environment of their own
	$(PYTHON) -m venv build/editors
	build/editors/bin/python -m pip install --quiet --disable-pip-version-check -e . jedi pyright pytest pytest-asyncio hypothesis
	build/editors/bin/python -m pytest -q -p no:cacheprovider tests/typing

check: $(VENV)/.dev ## Lint, format and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Run every benchmark that needs no peer outside the dev tools
	$(BIN)/python -m benchmarks

record: $(VENV)/.dev ## Re-record the demo's cassette from the simulated model
	$(BIN)/aggregator demo --serve --record

wheel: $(VENV)/.dev ## Build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist

clean: ## Remove the files that the targets made
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
