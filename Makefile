# make demo   environment, install, the main job on a real micrograph
# make test   environment, install, tests
# make lint   ruff and mypy, as CI runs them
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/.base
	$(BIN)/latentds demo --out demo --overwrite

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not assets"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 13), 'Python 3.10 to 3.13'"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) -e '.[autoencoders,embedders,bench,slides,dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
