# `make demo` and `make test` need only make and Python 3.11 or newer. Both install into $(VENV) on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := demo.png
TWO_AT_ONCE := -n 2 --dist loadfile      # files of tests share nothing

.PHONY: help demo test lint slow coverage bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       install into $(VENV) and paint $(DEMO) along examples/canny.png"
	@echo "make test       install with the dev extra and run the tests that are neither slow nor need a GPU"
	@echo "make lint       flake8, isort and mypy"
	@echo "make slow       the tests that take minutes"
	@echo "make coverage   the tests of \`make test\`, failing under 85 % line coverage"
	@echo "make bench      measure all decoders of the embedded model, in float32 and int8, into docs/decoders.md"
	@echo "make clean      remove $(VENV) and $(DEMO)"
	@echo "variables: PYTHON=python3.12  VENV=/some/folder"

demo: $(VENV)/.installed
	$(BIN)/arimg sample --control examples/canny.png --class fluent/animals --seed 8 -o $(DEMO)
	@echo "The picture is $(CURDIR)/$(DEMO)"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(TWO_AT_ONCE)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m flake8 arimg scripts tests
	$(BIN)/python -m isort --check-only --diff arimg scripts tests
	$(BIN)/python -m mypy arimg

# pytest exits with 5 when no test carries the mark: said aloud, and not a failure.
slow: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m "slow and not cuda" $(TWO_AT_ONCE) || { code=$$?; [ $$code -eq 5 ] || exit $$code; \
		echo "make slow: no test is marked slow, so none ran"; }

coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --cov --cov-report=term

bench: $(VENV)/.installed
	@{ $(BIN)/arimg bench decode -n 2 --repeats 2 && echo && \
		$(BIN)/arimg bench decode -n 2 --repeats 2 --quantize int8; } > docs/decoders.md.new
	@mv docs/decoders.md.new docs/decoders.md

clean:
	rm -rf $(VENV) $(DEMO)

# The stamps: a changed dependency list installs again, an unchanged one does not.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(call install,.)
	touch $@

$(VENV)/.installed-dev: setup.cfg pyproject.toml constraints.txt
	$(call install,.[dev])
	touch $(VENV)/.installed $@

define install
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "arimg needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; type: make PYTHON=python3.12 ...")'
$(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '$(1)'
endef
