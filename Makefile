# Every target runs inside Baton's Python environment, which `in_env.sh` makes first where it is missing.
IN_ENV := infra/local/in_env.sh
STACK := $(IN_ENV) python -m infra.local
ARGS ?=

.DEFAULT_GOAL := help

##@ Set up
.PHONY: help setup lock
help:  ## Show this help
	@awk 'BEGIN { FS = ":.*## " } \
	    /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	    /^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Fetch all that is needed, once: Python packages, Kafka, the small model
	@$(STACK) setup

lock:  ## Resolve pyproject.toml into requirements.lock again
	@$(IN_ENV) uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
	    --no-emit-index-url --no-header --quiet --output-file requirements.lock

##@ Run
.PHONY: demo up down status
demo:  ## See it once: start all, one chat answer, a slice of a real trace, stop all (about a minute)
	@$(IN_ENV) python -m infra.demo

up:  ## Start Kafka, Redis and all services here (ARGS="--decode 4"; ARGS=--help lists them)
	@$(STACK) up $(ARGS)

down:  ## Stop them, and whatever a crash left behind
	@$(STACK) down $(ARGS)

status:  ## Show what runs
	@$(STACK) status $(ARGS)

##@ Check
.PHONY: check test faults sim check-docker clean
check:  ## Format, lint, types and the direction of imports
	@$(IN_ENV) ruff format --check --quiet .
	@$(IN_ENV) ruff check --quiet .
	@$(IN_ENV) pyright
	@PYTHONPATH=. $(IN_ENV) lint-imports --no-logo

test:  ## Run all tests, real Kafka, Redis and UCX included (ARGS="-k fold")
	@$(IN_ENV) python -m pytest $(ARGS)

faults:  ## Trouble real processes under load (ARGS="--faults 500 --minutes 25 --seed 1"; --help lists all)
	@$(IN_ENV) python -m tests.faults.cluster $(ARGS)

sim:  ## Trouble the whole system in one loop, by the thousand schedules (ARGS="--seeds 10000"; --help lists all)
	@$(IN_ENV) python -m tests.sim $(ARGS)

check-docker:  ## Try docker-compose.yml on this host's docker engine, from up to down
	@$(IN_ENV) python -m infra.docker.check

clean:  ## Remove what runs and checks leave in the checkout
	@if [ -e .run/state.json ]; then $(STACK) down; fi
	@rm -rf .run .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
