# make run: every notebook on the preset that fits this machine. make test: everything that can be checked without a GPU.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: run test exercises lint torture clean

run: $(VENV)/.installed
	$(BIN)/python -m pdpo run

test: $(VENV)/.installed
	PDPO_TEST_RUNS_DIR=$(CURDIR)/runs $(BIN)/python -m pytest -p no:nbval -n $(JOBS) --dist loadfile tests
	@echo "now every notebook, cell by cell, against its stored outputs"
	PDPO_PRESET=tiny $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --nbval notebooks

# notebooks/exercises (stubs) from notebooks/solutions (what is edited and tested)
exercises: $(VENV)/.installed
	$(BIN)/python notebooks/make_exercises.py

lint: $(VENV)/.installed
	$(BIN)/ruff check pdpo tests notebooks benchmarks
	$(BIN)/ruff format --check pdpo tests benchmarks

# torch first: an open range would let another package choose a build of several gigabytes
$(VENV)/.installed: requirements.txt pyproject.toml .ci/constraints.txt
	@echo "installing into $(VENV) (once; some minutes, about 2 GB on a machine without a GPU)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable ".[dev]"
	touch $@

# damage, kills, full disks, bad input: over 600 trials; prints tried and survived
torture: $(VENV)/.installed
	$(BIN)/python tests/dev/torture.py

clean:
	rm -rf $(VENV) runs
