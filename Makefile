# Every target does its own set-up: a clone, Python 3.11+ and git are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# Files, folders or single tests, with their slow tests: make test T=tests/data
T ?=
# Two files of tests at a time, each on one thread, long ones first; the order of sets is always the same.
SUITE = PYTHONHASHSEED=0 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(T)
SEEDS ?= 20
TORCHES ?= 2.11.0 2.12.0 2.13.0

.PHONY: demo test quick slow seeds lint format docs config-docs types bench bugs masks crash gpu gpu-fake gpu-torch fuzz fuzz-templates fuzz-serve hostile hosts scale release dist clean
.DEFAULT_GOAL := help

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/python -m pip install -q -e '.[bench]'
	touch $@

demo: $(VENV)/installed  ## fine-tune the small model that ships with the project, end to end
	rm -rf $(DEMO)
	$(BIN)/lorafit train demo/recipe.yaml --output $(DEMO)

test: $(VENV)/installed-dev  ## all tests but the slow ones, within five minutes; a part with all its tests: make test T=tests/data
	$(SUITE) $(if $(T),,-m 'not slow')

quick: $(VENV)/installed-dev  ## the tests of the layers below the model, within a minute
	$(SUITE) -m quick

slow: $(VENV)/installed-dev  ## the slow tests, which `make test` leaves out
	$(SUITE) -m slow

seeds: $(VENV)/installed-dev  ## the property tests with SEEDS fresh seeds; each one that fails is named
	$(BIN)/python -m tests.seeds --count $(SEEDS) $(T)

fuzz: $(VENV)/installed-dev  ## 200,000 hostile rows, files, texts, configs, commands, templates and runs (most of an hour)
	$(BIN)/python -m tests.hostile.fuzz --examples 200000 --into docs/security.md

fuzz-templates: $(VENV)/installed-dev  ## 200,000 templates of Jinja's whole grammar: time and memory beside the bill (hours)
	$(BIN)/python -m tests.hostile.fuzz --examples 200000 sandbox

fuzz-serve: $(VENV)/installed-dev  ## the server against many generated requests (minutes)
	LORAFIT_FUZZ_EXAMPLES=1000 $(BIN)/python -m pytest tests/serve/test_fuzz.py

lint: $(VENV)/installed-dev  ## formatter, linter and strict types, as CI runs them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/installed-docs config-docs  ## the documentation as a site with search, in build/site
	$(BIN)/python tools/site.py

config-docs: $(VENV)/installed  ## write docs/config.md from the schema
	$(BIN)/lorafit config --markdown > docs/config.md

bench: $(VENV)/installed-bench  ## speed and memory beside the classic script and TRL (most of an hour)
	$(BIN)/python -m benchmarks.speed --work runs/bench --json runs/bench/speed.json

bugs: $(VENV)/installed-dev  ## put 32 known bugs in, one after another, and see each probe fail
	$(BIN)/python -m tests.bugs

masks: $(VENV)/installed-dev  ## 500 conversations of each chat format with each tokenizer: what is trained is exact
	$(BIN)/python -m tests.data.masks

crash: $(VENV)/installed-dev  ## kill, starve and damage runs, resume them, compare bytes (about an hour)
	$(BIN)/python -m tests.crash --long --write docs/reliability.md

hostile: $(VENV)/installed-dev  ## every hostile file with everything that reads it (minutes)
	LORAFIT_LONG=1 $(BIN)/python -m pytest tests/hostile tests/hub/test_answers.py

gpu: $(VENV)/installed  ## whoever has a GPU: is it right and fast there? 9 minutes, no network; send gpu.json
	$(BIN)/python -m benchmarks.gpu

gpu-fake: $(VENV)/installed-dev  ## the CUDA path without a GPU: every slow case too (tens of minutes)
	LORAFIT_LONG=1 $(BIN)/python -m pytest tests/gpu

gpu-torch:  ## the CUDA path without a GPU, with each torch that is allowed: TORCHES="2.11.0 2.12.0 2.13.0"
	for torch in $(TORCHES); do \
		$(PYTHON) -m venv build/torch-$$torch && \
		build/torch-$$torch/bin/python -m pip install -q -e . torch==$$torch bitsandbytes pytest hypothesis && \
		build/torch-$$torch/bin/python -m pytest tests/gpu -p no:cacheprovider || exit 1; \
	done

hosts: $(VENV)/installed-dev  ## two machines made of network namespaces: a link cut, a host killed (root); Ray if there
	LORAFIT_LONG=1 $(BIN)/python -m pytest tests/distributed/test_hosts.py tests/distributed/test_ray.py -s

scale: $(VENV)/installed-dev  ## a step of two ranks beside the predicted one, on a calm machine
	$(BIN)/python -m benchmarks.scaling

release: $(VENV)/installed-dev  ## set the version and date the changelog: make release VERSION=0.2.0
	$(BIN)/python tools/release.py $(VERSION)

dist: $(VENV)/installed-dev  ## sdist and wheel of a clean clone in dist/, and a strict check of their metadata
	@test -z "$$(git status --porcelain)" || { echo "error: the working tree is not clean: see git status" >&2; exit 2; }
	rm -rf dist
	$(BIN)/python -m hatchling build
	$(BIN)/python -m twine check --strict dist/*

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
