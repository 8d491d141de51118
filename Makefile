# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
MINUTES ?= 10
BIN := $(VENV)/bin

.PHONY: help demo test drill docs dist soak model guards mutants fuzz bench screenshots clean

help:
	@echo 'make demo [ARGS="PATH…"]   send files through a real Kafka, receive and compare them'
	@echo 'make test [ARGS="…"]       linters, types, all tests (ARGS go to pytest)'
	@echo 'make drill                 receive 200 requests, lose the root, rebuild it from the log'
	@echo 'make docs                  build the documentation into site/'
	@echo 'make dist                  build wheel and sdist of the last commit into dist/'
	@echo 'make soak [MINUTES=10]     all faults mixed, from a seed (ARGS="--seed N")'
	@echo 'make model [ARGS="WORLD…"]  explore small worlds in every order of events'
	@echo 'make guards [ARGS="WORD…"]  take each guard out of a copy and see its test go red'
	@echo 'make mutants ARGS="NAME"   change a module in many small ways, and see each noticed'
	@echo 'make fuzz [ARGS="--seed N"]  a million inputs for the codec, 100,000 for the whole intake'
	@echo 'make bench [ARGS="NAME…"]  all benchmarks in 20 to 30 minutes, and the page of their figures'
	@echo 'make screenshots           pictures of the live page during a real transfer'
	@echo 'make clean                 remove the virtual environment and caches'

demo: $(VENV)/.installed
	$(BIN)/splitferry demo $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(ARGS)

drill: $(VENV)/.installed-dev
	$(BIN)/pytest tests/integration/test_recovery_drill.py $(ARGS)

# Strict: a broken link, or a name of the API that is not there, fails it.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# What is committed and nothing else, dated by the commit: built again, it is the same bytes.
dist: $(VENV)/.installed-dist
	rm -rf dist build/commit
	mkdir -p build/commit
	git archive HEAD | tar -x -f - -C build/commit
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --outdir dist build/commit

soak: $(VENV)/.installed-dev
	$(BIN)/python tests/soak/run.py --minutes $(MINUTES) $(ARGS)

model: $(VENV)/.installed-dev
	PYTHONPATH=tests $(BIN)/python -m model.explore $(ARGS)

guards: $(VENV)/.installed-dev
	$(BIN)/python tests/guards/run.py $(ARGS)

mutants: $(VENV)/.installed-mutants
	$(BIN)/python tests/mutants/run.py $(ARGS)

fuzz: $(VENV)/.installed-dev
	$(BIN)/python tests/fuzz/codec.py --runs 1000000 $(ARGS)
	$(BIN)/python tests/fuzz/intake.py --runs 100000 $(ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/run.py $(ARGS)

screenshots: $(VENV)/.installed-dev
	PYTHONPATH=tests $(BIN)/python tests/page/screenshots.py

clean:
	rm -rf $(VENV) .venv-openmsistream .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site

# The project is installed in place, so only a change of its dependencies calls for another go.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'splitferry needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 …' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo 'this Python lacks its venv module: on Debian, apt install python3-venv' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[broker,otel,web]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group docs
	@touch $@

$(VENV)/.installed-dist: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dist
	@touch $@

$(VENV)/.installed-mutants: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group mutants
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group bench
	@touch $@
