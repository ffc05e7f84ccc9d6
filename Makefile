# make demo   environment, install, the main job on real H&E pictures
# make test   environment, install, tests
# make lint   ruff and mypy, as CI runs them
# make docs   the site, in site/; a warning is an error
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
# uv takes a fifth of pip's time; pip does it where uv or its index cannot be had.
INSTALL = ($(PIP) uv && $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.$(EXTRAS)') \
	|| $(PIP) -c constraints.txt -e '.$(EXTRAS)'

.PHONY: demo test lint docs clean

demo: $(VENV)/.base
	$(BIN)/latentds demo --out demo --overwrite

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not assets"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p .mypy_cache/names && cd .mypy_cache/names && ln -sfn ../../tools latentds_tools && ln -sfn ../../trainers latentds_trainers
	$(BIN)/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 13), 'Python 3.10 to 3.13'"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL)
	touch $@

# Compiled once, not by each of the processes that tests start side by side.
$(VENV)/.dev: export UV_COMPILE_BYTECODE = 1
$(VENV)/.dev: EXTRAS := [autoencoders,embedders,bench,slides,dev,docs]
$(VENV)/.dev: $(VENV)/.base
	$(INSTALL)
	touch $@

clean:
	rm -rf $(VENV) demo site build *.egg-info
