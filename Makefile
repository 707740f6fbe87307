# `make demo`, `make test` and `make docs` work on a fresh machine with Python 3.10 to 3.13: each makes its own environment first.
PYTHON ?= python3
BIN := .venv/bin
REMEDY = install one of these, and name it: make PYTHON=python3.11 $(MAKECMDGOALS)
TEST = python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-oldest lint docs clean

demo: .venv/installed
	$(BIN)/latentflow demo --out demo

test: .venv/installed lint
	$(BIN)/$(TEST)

lint: .venv/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# The documentation site, site/index.html; a broken link is an error.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# With the oldest versions that are allowed, in an environment of their own.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/$(TEST)

.venv/installed: pyproject.toml constraints.txt
.venv-oldest/installed: pyproject.toml constraints-oldest.txt
.venv/installed: CONSTRAINTS = constraints.txt
.venv-oldest/installed: CONSTRAINTS = constraints-oldest.txt

# An environment that was not finished, or was made by another Python, is made again.
.venv/installed .venv-oldest/installed:
	@"$(PYTHON)" -c "" 2>/dev/null || { echo "there is no $(PYTHON) that runs here; $(REMEDY)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
		"latentflow needs Python 3.10 to 3.13, and $(PYTHON) is %d.%d; $(REMEDY)" % v)'
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make environments; install the \
	package python3-venv of your system, or another Python: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

# What builds the documentation is installed next to what the tests need.
.venv/installed-docs: .venv/installed
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv .venv-oldest demo site
