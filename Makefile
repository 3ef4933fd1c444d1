# Each target sets itself up: it makes .venv where there is none and installs what is needed.
PYTHON ?= python3
VENV := .venv/bin/python

# Idle OpenMP threads that spin instead of sleeping slow everything down on shared machines.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-full demo-ct demo-dia test lint bench

# One thread: on networks this small two threads wait for each other more than they work.
demo: .venv/installed
	OMP_NUM_THREADS=1 $(VENV) demos/phantom.py

demo-full: .venv/installed
	OMP_NUM_THREADS=1 $(VENV) demos/phantom.py --full

demo-ct: .venv/installed
	$(VENV) demos/ct.py

demo-dia: .venv/installed
	$(VENV) demos/clothes.py

test: .venv/installed
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n auto --dist worksteal

lint: .venv/installed
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

bench: .venv/installed
	$(VENV) benchmarks/heatmap_speed.py
	$(VENV) benchmarks/dia_speed.py

.venv/installed: requirements.txt pyproject.toml
	test -x $(VENV) || $(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements.txt -e ".[dev]"
	touch $@
