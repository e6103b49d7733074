# make demo: all set-up, then the whole loop on this machine. make test: all set-up, then every test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORLDS := recogym==0.1.3.0 recsim==0.2.4

.PHONY: demo test lint compose-test faults clean

# .installing: what pip was about when it was interrupted is in pieces, which it cannot mend itself
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Bellwether needs Python 3.11 or newer, not " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(if $(wildcard $(VENV)/.installing),--clear) $(VENV)
	@echo "installing into $(VENV) (PyTorch is large: minutes on a slow line)"
	@touch $(VENV)/.installing
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@mv $(VENV)/.installing $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@mv $(VENV)/.installed $(VENV)/.installing
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@# other people's worlds, without what they require and we do not use; tests that need them are skipped without
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(WORLDS)
	@mv $(VENV)/.installing $(VENV)/.installed
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
