# The same verbs for people and for CI. Every verb makes the virtual environment by itself if it is not there yet.
.DEFAULT_GOAL := help
CHECKS := check-mypy check-pyright check-ruff check-contracts check-generated check-shell check-prometheus check-docker
.PHONY: help setup demo test test-slow test-all setup-light test-light check $(CHECKS) proto generate-proto bench wheel test-arm testbed clean

VENV ?= .venv
EXTRAS := coordinator,agent,train,torch-cpu,parquet,demo,dev
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# The tests run in several processes at once (tests/conftest.py says how many); with ARGS="-n 0" one after the other, in one process.
SIDE_BY_SIDE := -n auto --dist worksteal
export PYTHON TORCH_INDEX

help:
	@echo 'make setup    virtual environment in $(VENV) with everything (PYTHON=..., TORCH_INDEX=...)'
	@echo 'make demo     a coordinator and three agents on this machine fine-tune MiniLM (METHOD=deft, DEMO_ARGS="--rounds 3")'
	@echo 'make test     the tests, but for the slow ones (ARGS="tests/wire -k codec")'
	@echo 'make test-slow  the slow ones: fleets of real processes'
	@echo 'make test-all both'
	@echo 'make check    lint, types, import contracts, generated code'
	@echo 'make test-light  the tests that need no torch, in an environment without it (PYTHON=python3.10)'
	@echo 'make proto    code from the .proto files'
	@echo 'make bench    rounds against bare gRPC (BENCH_ARGS="--agents 8 --mib 16")'
	@echo 'make wheel    wheel and sdist in dist/'
	@echo 'make test-arm the agent in an emulated aarch64 Debian, against a coordinator here; root (ARM_ARGS="--folder DIR")'
	@echo 'make testbed  unequal devices on this machine, with faults and a report (TESTBED_BACKEND=netns, TESTBED_ARGS="--set rounds.count=4")'
	@echo 'make clean    removes what the above made, but for $(VENV)'

setup: $(READY)

$(READY): pyproject.toml constraints.txt deploy/setup.sh
	@echo 'setting up $(VENV)'
	@./deploy/setup.sh $(VENV) $(EXTRAS)
	@touch $@

demo: $(READY)
	@$(VENV)/bin/fleetune demo $(if $(METHOD),--method $(METHOD)) $(DEMO_ARGS)

test: $(READY)
	@$(PY) -m pytest -q -m 'not slow' $(SIDE_BY_SIDE) $(ARGS)

test-slow: $(READY)
	@$(PY) -m pytest -q -m slow $(SIDE_BY_SIDE) $(ARGS)

test-all: $(READY)
	@$(PY) -m pytest -q $(SIDE_BY_SIDE) $(ARGS)

# All of them run, so that one look shows every complaint: two at a time where make keeps what they print apart.
check: $(READY)
	@$(MAKE) --no-print-directory --keep-going $(if $(filter output-sync,$(.FEATURES)),--jobs=2 --output-sync) $(CHECKS)

check-mypy: $(READY)
	@echo '== mypy'; $(VENV)/bin/mypy --no-error-summary

check-pyright: $(READY)
	@echo '== pyright'; PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --warnings

check-ruff: $(READY)
	@echo '== ruff'; $(VENV)/bin/ruff check --quiet

check-contracts: $(READY)
	@echo '== import contracts'; $(VENV)/bin/lint-imports --no-logo

check-shell: $(READY)
	@echo '== shellcheck'; $(VENV)/bin/shellcheck deploy/*.sh deploy/docker/*.sh .ci/run .ci/testbed

check-prometheus:
	@echo '== Prometheus files'; deploy/prometheus/check.sh

check-docker:
	@echo '== compose and Docker files'; deploy/docker/check.sh

check-generated: $(READY)
	@echo '== generated code'; $(PY) -m pytest -q tests/test_proto_fresh.py

# An environment of its own for each Python; no torch in it, as on a relay or a small board.
LIGHT = .venv-light-$(notdir $(or $(PYTHON),python3))
LIGHT_EXTRAS := coordinator,agent,test
setup-light: $(LIGHT)/.ready

test-light: $(LIGHT)/.ready
	@$(LIGHT)/bin/python -m pytest -q -m 'not slow' $(SIDE_BY_SIDE) $(ARGS)

$(LIGHT)/.ready: pyproject.toml constraints.txt deploy/setup.sh
	@echo 'setting up $(LIGHT)'
	@./deploy/setup.sh $(LIGHT) $(LIGHT_EXTRAS)
	@touch $@

proto: $(READY)
	@$(MAKE) --no-print-directory generate-proto

# OUT: where the code goes; the freshness test writes it aside and compares.
OUT := proto
PROTOS = $(shell cd proto && find fleetune -name '*.proto' | sort)
SERVICES = $(shell cd proto && grep -l '^service ' $(PROTOS))
generate-proto:
	@PATH="$(abspath $(dir $(PY))):$$PATH" $(PY) -m grpc_tools.protoc -Iproto --python_out=$(OUT) --mypy_out=quiet:$(OUT) $(PROTOS)
	@PATH="$(abspath $(dir $(PY))):$$PATH" $(PY) -m grpc_tools.protoc -Iproto --grpc_python_out=$(OUT) --mypy_grpc_out=quiet:$(OUT) $(SERVICES)

bench: $(READY)
	@$(PY) bench/rounds.py $(BENCH_ARGS)

wheel: $(READY)
	@rm -rf dist
	@$(VENV)/bin/hatchling build -d dist

# Minutes, a mirror of Debian and root: too much for every change. docs/edge-install.md has its last result.
test-arm: $(READY)
	@$(PY) bench/arm.py $(ARM_ARGS)

# From nothing to a report; what a crash has left of the last time goes first. testbed-state/ keeps record and report.
TESTBED_BACKEND := compose
TESTBED_FILE := deploy/testbed.toml
TESTBED_CHAOS := deploy/chaos.toml
TESTBED = $(VENV)/bin/fleetune testbed
testbed: $(READY)
	@$(TESTBED) down
	@$(TESTBED) up --backend $(TESTBED_BACKEND) --file $(TESTBED_FILE)
	@status=0; $(TESTBED) run --chaos $(TESTBED_CHAOS) $(TESTBED_ARGS) || status=$$?; $(TESTBED) down || exit; exit $$status

clean:
	@rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .venv-light-*
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
