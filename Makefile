# make demo | test | lint | bench | soak: each makes .venv when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# pip 25.1 is the first that knows --group.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench soak clean

demo: $(READY)
	$(BIN)/python examples/demo.py

# Two tests at a time, each file by one process, what needs Ray last.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# About an hour: FULL=1 takes more seeds and runs, SMALL=1 only finds out whether all of them work.
bench: $(READY)
	$(BIN)/python benchmarks/bench.py

# The property tests and the fault tests again, with far more examples; the latter for so many seconds: make soak SECONDS=600
SECONDS ?= 600
soak: $(READY)
	SOAK_SECONDS=$(SECONDS) $(BIN)/python -m pytest --hypothesis-profile=soak --timeout=0 \
		tests/test_hopper_machine.py tests/test_simulation.py tests/test_journal.py tests/test_power_loss.py \
		tests/test_resume.py tests/test_supervision.py tests/test_faults.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis runs

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(PIP) torch
	$(PIP) --group dev
	$(PIP) --editable ".[all]"
	touch $@
