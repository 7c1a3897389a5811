# Everything a newcomer types. `make demo` and `make test` install what they need into .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help demo bench test test-fast test-only lint type coverage clean

help:
	@echo "make demo                          the whole job on drawn phantoms, about 3 minutes on 2 cores"
	@echo "make demo DATA=/path/to/chest_xray the same on a real folder (split/class/*.jpeg)"
	@echo "make bench [DATA=…]                how fast every part is, against a plain program; some 20 minutes"
	@echo "make test                          lint, types and every test"
	@echo "make lint | type | test-only       one of them"
	@echo "make test-fast                     the quick files' tests, 3 minutes, while you work"
	@echo "make coverage                      every test, and which lines and branches of the library none runs"
	@echo "make clean                         removes what the demo made, not .venv"

# The stamps make the installation happen once, and again when pyproject.toml changes.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.11 …"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "venv is missing: apt install python3-venv"; exit 1; }
	@echo "installing into $(VENV): PyTorch and what it brings are some 6 GB, which takes minutes"
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(VENV)/installed
	@if [ -z "$(DATA)" ]; then \
	    $(BIN)/cxr-vae phantom demo/phantoms/images && \
	    $(BIN)/cxr-launch pipeline configs/demo.yaml --cluster inline; \
	else \
	    name=$$(basename "$(DATA)") && \
	    $(BIN)/cxr-launch pipeline configs/demo.yaml --cluster inline "data.source=$(DATA)" \
	        "data.shards=demo/$$name/shards" "run_dir=demo/$$name/run"; \
	fi

# From the checkout's folder, where the scripts find one another.
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.speed $(if $(DATA),--data "$(DATA)") $(BENCH_ARGS)

test: lint type test-only

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/installed-dev
	$(BIN)/mypy
	$(BIN)/mypy --scripts-are-modules slurm/local_cluster

# Four files at once, which wait for processes half of the time; with more than one thread each they would wait for one another.
test-only: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 4 --dist loadfile -m "not slow" $(PYTEST_ARGS)

# In all processes that tests start, too.
coverage: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

clean:
	rm -rf demo
