# make demo: all set-up, then the whole loop on this machine. make test: all set-up, then every test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORLDS := recogym==0.1.3.0 recsim==0.2.4

.PHONY: demo test lint compose-test faults clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Bellwether needs Python 3.11 or newer, not " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@# an installation that was interrupted leaves packages in pieces, which pip cannot mend
	$(PYTHON) -m venv $(if $(wildcard $@),,--clear) $(VENV)
	@echo "installing into $(VENV) (PyTorch is large: minutes on a slow line)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@# other people's worlds, without what they require and we do not use; tests that need them are skipped without
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(WORLDS)
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m simulator.demo

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

compose-test: $(VENV)/.installed-dev
	BELLWETHER_COMPOSE_TEST=1 $(BIN)/pytest -v -s --durations=10 -m docker tests/test_compose.py

faults: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.faults --json benchmarks/results/faults.jsonl

clean:
	rm -rf $(VENV) .bellwether .kafka .pytest_cache .mypy_cache .ruff_cache
