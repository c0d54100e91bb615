# Every target makes its own virtual environment first; python3 >= 3.10, make and a package index are all it needs.
PYTHON ?= python3
DATA ?=
RAW ?=
RUN ?=
# Test files run side by side, each on one thread.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A thread that waits must not starve other processes: see docs/decisions.md.
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo demo-training test lint bench pack clean help

help:
	@echo "make demo   three fresh phantoms, or DATA=folder of yours, segmented with the released weights: runs/demo/report.html"
	@echo "            RAW=1: a phantom's DICOM study as it leaves the scanner: runs/demo/scanned/report.html"
	@echo "make demo-training"
	@echo "            phantoms -> three models, five folds each -> ensemble -> tables, figures, pictures (minutes)"
	@echo "make test   all tests with coverage"
	@echo "make lint   ruff check, ruff format --check, mypy"
	@echo "make pack   the three bundles as zips that work by themselves (dist/)"
	@echo "make bench  speed and memory against MONAI's own networks (docs/benchmarks.md); on real subjects too with"
	@echo "            DATA=dataset folder and RUN=folder of comnet crossval --config small.json"

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: $(READY)
	$(BIN)/comnet demo --output_dir runs/demo $(if $(DATA),--data "$(DATA)") $(if $(RAW),--raw)

demo-training: $(READY)
	$(BIN)/comnet demo_training --output_dir runs/demo-training

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --cov --cov-report=term:skip-covered

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/bench_mednext.py --full --skip training --output docs/benchmarks.md
	$(BIN)/python benchmarks/bench_mednext.py --skip forward --output docs/benchmarks.md
	$(BIN)/python benchmarks/clinical_heads.py --output docs/benchmarks.md
	test -z "$(DATA)" || $(BIN)/python benchmarks/bench_segment.py --data $(DATA) --output docs/benchmarks.md
	test -z "$(DATA)" -o -z "$(RUN)" || \
		$(BIN)/python benchmarks/window_plans.py --run $(RUN) --data $(DATA) --output docs/benchmarks.md

pack: $(READY)
	$(BIN)/comnet pack --output_dir dist

clean:
	rm -rf $(VENV) runs dist .pytest_cache .ruff_cache .coverage
