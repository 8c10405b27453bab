# Halfmoon's verbs. Everything is installed into .venv, from constraints.txt's tested versions.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
# tests that run at the same time; auto: a worker a core
WORKERS ?= auto
# tests of one file stay on one worker, and so do all whose clusters share one Ray; the longest come first (tests/conftest.py)
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadscope --no-loadscope-reorder
# spawned processes must not find kernels/ or proxy/ as top-level packages
export PYTHONSAFEPATH := 1
# the tests start hundreds of processes: each would compile every file anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test soak check lint proto docs audit clean

$(VENV)/server.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[server]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/server.stamp
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/docs.stamp: $(VENV)/server.stamp
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/audit.stamp: $(VENV)/server.stamp
	$(PIP) install -c constraints.txt -e '.[audit]'
	@touch $@

demo: $(VENV)/server.stamp  ## a local cluster, a request through prefill -> store -> decode, its phase record
	$(BIN)/python -m halfmoon.deploy.demo

test: $(VENV)/dev.stamp  ## the whole suite, no GPU needed
	$(PYTEST)

soak: $(VENV)/dev.stamp  ## two minutes of random faults on a live cluster; docs/faults.md
	$(BIN)/python -m halfmoon bench soak --minutes 2

check: lint  ## lint, types and the fast tests: without tests/kernels, tests/engine, both workers, tests/deploy and what is marked slow
	$(PYTEST) -m "not slow" tests/protocol tests/kvstore tests/client tests/proxy tests/simulator tests/test_floors.py

lint: $(VENV)/dev.stamp  ## ruff, pyright, and the stubs against the .proto files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

proto: $(VENV)/dev.stamp  ## generate protocol/v1/*_pb2*.py from the .proto files
	$(BIN)/python -m halfmoon.protocol.generate

docs: $(VENV)/docs.stamp  ## the site of docs/, into out/docs; fails at the first warning
	$(BIN)/python docs/_site/http_page.py
	$(BIN)/python -m halfmoon.protocol.metrics_page
	$(BIN)/python -m halfmoon.proxy.openai.conformance
	$(BIN)/mkdocs build --strict

audit: $(VENV)/audit.stamp  ## bandit, an SBOM in out/sbom.json, and known faults of dependencies (pip-audit asks pypi.org)
	$(BIN)/bandit -q -r . -c pyproject.toml -ll
	@mkdir -p out
	$(BIN)/cyclonedx-py environment $(VENV) --pyproject pyproject.toml --output-reproducible -o out/sbom.json
	$(BIN)/pip-audit --skip-editable

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
