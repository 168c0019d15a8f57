# make demo    watch a recommender learn from a stream, on a real Kafka     (SECONDS=60, RATE=…, LOG=taobao PATH_TO_LOG=…)
# make test    everything that is promised, tested on the real broker
# make nightly the tests that take minutes: replays of real logs, bugs planted for the torture to find
# make check   lint, security lint, types, directions of imports
# make audit   known vulnerabilities and licenses of what is installed, and a list of it (sbom.json, CycloneDX)
# make figures every figure that is promised, measured anew    (ONLY=replay, ONLY=replay.kills; HEADRACE_DATA=…)
# make bench-check  ratios to the references beside those that were kept    (ARGS=--keep: keep them as they are now)
# make setup   what the others need: .venv, from the pins, in seconds when it is done already
# make helm    helm, which the tests of the chart need: built with Go, minutes; without it they are skipped
# make pins    compile requirements/*.txt anew from pyproject.toml

EXTRA   ?= cpu
VENV    := .venv
BIN     := $(VENV)/bin
PYTHON  ?= $(firstword $(shell for v in python3.11 python3.12 python3.13 python3; do \
             $$v -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$v; done))
UV      := $(BIN)/uv
UV_PIN   = $(shell sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements/$(EXTRA).txt)
SECONDS ?= 60
DEMO    := --json --seconds $(SECONDS) $(if $(RATE),--rate $(RATE)) $(if $(LOG),--log $(LOG) --path $(PATH_TO_LOG)) $(ARGS)
READY   := $(VENV)/.ready-$(EXTRA)

.PHONY: helm demo test test-with-broker test-models test-others nightly check audit figures bench-check setup pins clean

demo: setup
	@$(BIN)/headrace demo $(DEMO)

# A part of it waits for Kafka, the others compute: side by side, of about the same length, unless something is asked for.
MODELS := tests/online_model tests/embedding_store
SERVING := tests/online_model/serving
OTHERS := $(filter-out $(MODELS) %/__init__.py %/conftest.py %/__pycache__,$(wildcard tests/*)) $(SERVING)
test: setup
ifeq ($(strip $(ARGS)),)
	@$(MAKE) --no-print-directory --jobs 3 test-with-broker test-models test-others
else
	@$(BIN)/python -m pytest $(ARGS)
endif

test-with-broker test-models test-others: SHELL := bash -o pipefail
test-with-broker: setup
	@PYTHONUNBUFFERED=1 $(BIN)/python -m pytest --durations 15 -m 'not nightly and broker' 2>&1 | sed -u 's/^/broker | /'

test-models: setup
	@PYTHONUNBUFFERED=1 $(BIN)/python -m pytest --durations 15 -m 'not nightly and not broker' $(MODELS) --ignore=$(SERVING) 2>&1 | sed -u 's/^/models | /'

test-others: setup
	@PYTHONUNBUFFERED=1 $(BIN)/python -m pytest --durations 15 -m 'not nightly and not broker' $(OTHERS) 2>&1 | sed -u 's/^/others | /'

nightly: setup
	@$(BIN)/python -m pytest -m nightly $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml streams online_model embedding_store replay deploy .ci/audit

audit: setup
	$(BIN)/python .ci/audit requirements/$(EXTRA).txt --sbom sbom.json $(ARGS)

figures: setup
	@$(BIN)/python -m tests.figures $(ONLY) $(ARGS)

bench-check: setup
	@$(BIN)/headrace bench check $(ARGS)

setup: $(READY)

$(READY): requirements/$(EXTRA).txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "headrace needs Python 3.11, 3.12 or 3.13: install one, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(UV) || $(BIN)/pip install --quiet --disable-pip-version-check uv==$(UV_PIN)
	@echo "installing the pinned packages into $(VENV) (torch is large: a minute or two the first time)" >&2
	@$(UV) pip sync --quiet --require-hashes --compile-bytecode requirements/$(EXTRA).txt
	@$(UV) pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import embedding_store.probing, embedding_store.rowwise, online_model.kernels'
	@$(BIN)/headrace broker fetch
	@rm -f $(VENV)/.ready-* && touch $@

helm:
	@go install helm.sh/helm/v3/cmd/helm@v3.22.0

pins:
	@for extra in cpu cuda; do \
	  $(UV) pip compile --quiet --upgrade pyproject.toml --extra $$extra --extra dev --generate-hashes --no-emit-index-url \
	    --no-header --universal --python-version 3.11 --output-file requirements/$$extra.txt; done

clean:
	rm -rf $(VENV) .headrace
