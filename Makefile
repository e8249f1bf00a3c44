# make demo | test | gate | lint | types | docs | bench | versus | verify. Each sets up .venv by itself the first time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PARALLEL := -n auto --dist worksteal
CHECKED := fastrl kernels tests benchmarks examples setup.py

.PHONY: demo test gate lint types docs bench versus verify clean

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastrl needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/fastrl demo $(ARGS)

test: $(STAMP) lint
	$(BIN)/pytest -q $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/pytest -q $(PARALLEL) -m interpreter tests/kernels tests/fastrl/models tests/fastrl/rollout/test_decode.py

gate: $(STAMP) types
	$(BIN)/pytest -q $(PARALLEL) -m gate
	TRITON_INTERPRET=1 $(BIN)/pytest -q $(PARALLEL) -m "gate and interpreter" || test $$? = 5

lint: $(STAMP)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

types: $(STAMP)
	$(BIN)/pyright

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(ARGS)

versus: $(STAMP)
	$(BIN)/python -m benchmarks.vs_trl $(ARGS)

verify: $(STAMP)
	$(BIN)/python -m benchmarks.verify $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
