# Each target sets itself up: it makes .venv where there is none and installs what is needed.
PYTHON ?= python3
VENV := .venv/bin/python

# Idle OpenMP threads that spin instead of sleeping slow everything down on shared machines.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-full demo-ct demo-dia test faults test-oldest lock lint bench

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

# With the oldest versions that requirements.txt allows.
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto --dist worksteal

# The versions of .venv, with the hashes of their files. Needs uv.
lock: .venv/installed
	$(VENV) -m pip freeze --exclude-editable > .venv/tested.txt
	uv pip compile pyproject.toml --constraint .venv/tested.txt --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url --no-annotate \
		--custom-compile-command "make lock" --output-file requirements.lock

# Every fault many times, and the table in docs/reliability.md: an hour or two.
faults: .venv/installed
	OMP_NUM_THREADS=1 $(VENV) -m tests.faults

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

.venv-oldest/installed: requirements.txt pyproject.toml
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	sed -nE 's/^([A-Za-z0-9-]+)>=([0-9.]+).*/\1==\2/p' requirements.txt > .venv-oldest/pins.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		-r .venv-oldest/pins.txt -e ".[dev]"
	touch $@
