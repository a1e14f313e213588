# make run: notebooks 00 to 09 and 14 on the preset that fits this machine; make run-all: every one.
# make test: everything that can be checked without a GPU.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: run run-all test exercises results browser lint torture clean

run: $(VENV)/.installed
	$(BIN)/python -m pdpo run

run-all: $(VENV)/.installed
	$(BIN)/python -m pdpo run --notebooks all

test: $(VENV)/.installed
	PDPO_TEST_RUNS_DIR=$(CURDIR)/runs $(BIN)/python -m pytest -p no:nbval -n $(JOBS) --dist loadfile tests
	@echo "now every notebook, cell by cell, against its stored outputs"
	PDPO_PRESET=tiny $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --nbval notebooks

# notebooks/exercises (stubs) from notebooks/solutions (what is edited and tested)
exercises: $(VENV)/.installed
	$(BIN)/python notebooks/make_exercises.py

# README's numbers and its first figure, from the files that they come from
results: $(VENV)/.installed
	$(BIN)/python tests/dev/results.py

# JupyterLab in a headless Chromium; where no Chromium can be fetched, one that the machine has (Debian: apt install chromium)
browser: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable ".[browser]" || echo "playwright cannot be installed here"
	command -v chromium || timeout 600 $(BIN)/playwright install chromium || echo "no Chromium could be fetched; the test will say so"
	look() { PDPO_TEST_RUNS_DIR=$(CURDIR)/runs $(BIN)/python -m pytest -p no:nbval -rs tests/test_browser.py; }; \
	look || test $$? -eq 5 || look  # 5: skipped; a page that was slow to connect gets a second chance

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
