# `make demo` and `make test` do all of their own set-up, on a machine with Python >= 3.11.
PYTHON ?= python3
RUNS ?= runs/shapes
# `make test PARITY=,parity` also installs torch and diffusers, for the tests that compare with them
PARITY ?=
VENV := .venv
RUN := launch/local.sh $(VENV)/bin/python -m latent_diffusion_jax
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: demo test lint format docs clean

demo: $(VENV)/.installed
	$(RUN) train --config=configs/first_stage/shapes.py --workdir=$(RUNS)/ae
	$(RUN) encode --config=configs/diffusion/shapes.py --workdir=$(RUNS)/ldm \
	    --config.run.first_stage=$(RUNS)/ae
	$(RUN) train --config=configs/diffusion/shapes.py --workdir=$(RUNS)/ldm \
	    --config.run.first_stage=$(RUNS)/ae
	$(RUN) reconstruct --workdir=$(RUNS)/ldm --number=24
	$(RUN) sample --workdir=$(RUNS)/ldm --number=108 --batch=16
	@echo "curves: $(RUNS)/ae/curves.png $(RUNS)/ldm/curves.png"
	@echo "reconstructions: $(RUNS)/ldm/reconstructions.png"
	@echo "samples, 12 classes in turn: $(RUNS)/ldm/samples/grid.png"

# files in the order of their names: by their numbers of tests the heaviest would begin last
test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -n auto --maxprocesses=2 --dist=loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# the site, into site/; a warning is an error
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf runs/shapes .cache site

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null || \
	    { echo "Python >= 3.11 is needed: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -r requirements.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --editable '.[dev$(PARITY)]'
	@touch $@
