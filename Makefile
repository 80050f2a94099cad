# make demo    the benchmark on two real vLLM workers (ENGINE=sim: on simulated ones, in seconds)
# make grpo    GRPO training on two real vLLM workers (GRPO=key=value ...: overrides of its config)
# make test    C++ and Python tests, end to end on real vLLM workers (ENGINE=sim: without those)
# make test-nemo-rl NEMO_RL_SRC=DIR   the integration's contract tests, and NeMo-RL's own of generation with it enabled,
#              on a checkout of NeMo-RL; make bench-nemo-rl NEMO_RL_SRC=DIR: its rollouts with the router on and off
# make test-verl  verl's own load-balancer tests with kvrouter's in place (VERL_SRC=: of a checkout)
# make test-ray-serve  the request router in a real Ray Serve
# make lint    formatting, style and types
# make chaos   faults on 32 simulated and two real workers under load, and what is lost or believed wrongly (ENGINE=sim:
#              on simulated ones alone; CHAOS="--seed 7" repeats a run)
# make bench   the index, decoding and decisions measured beside their peers, into docs/performance (BENCH=--quick: a
#              trial on small streams, into out/bench)
# make policies  every policy in the fleet simulator, into docs/performance (POLICIES=--quick: small fleets, seconds,
#              into out/policies)
# make fuzz    every fuzz target for FUZZ_SECONDS (600), FUZZ_JOBS (2) at a time (FUZZ=NAME...: these alone), into out/fuzz
# make soak    mixed traffic for SECONDS (3600) through the service and a router: leaks, into out/soak
#
# Each installs what it needs first: Python packages into .venv, system packages through apt (said beforehand).

ENGINE ?= vllm
BENCH ?=
CHAOS ?=
GRPO ?=
NEMO_RL_SRC ?=
POLICIES ?=
FUZZ ?=
FUZZ_SECONDS ?= 600
FUZZ_JOBS ?= 2
SECONDS ?= 3600
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
JOBS ?= $(shell nproc)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The compiler's cache holds across checkouts: a fresh clone that was built before elsewhere builds quickly.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1

CXX_SOURCES := $(shell find include src sim cmake -type f) CMakeLists.txt pyproject.toml
CXX_FILES := $(shell find include src sim tests/cpp tests/fuzz benchmarks -name '*.h' -o -name '*.cc')
ENGINE_STAMP := $(if $(filter vllm,$(ENGINE)),$(STAMPS)/vllm,)

.PHONY: all chaos demo grpo test test-cpp test-python test-nemo-rl bench-nemo-rl test-verl test-ray-serve sanitize fuzz \
  soak bench lint format clean help policies
all: $(STAMPS)/package

demo: $(STAMPS)/package $(ENGINE_STAMP)
	$(BIN)/python examples/run_router_benchmark.py --engine $(ENGINE) --workload all --output out/demo

grpo: $(STAMPS)/package $(STAMPS)/vllm
	$(BIN)/python examples/run_grpo.py --config examples/configs/grpo_with_router_example.yaml $(GRPO)

test: test-cpp test-python

test-cpp: $(STAMPS)/system-test
	cmake --preset release > /dev/null
	cmake --build --preset release --parallel $(JOBS)
	ctest --preset release --parallel $(JOBS)

test-python: $(STAMPS)/package $(STAMPS)/test $(ENGINE_STAMP)
	$(BIN)/python -m pytest $(if $(filter vllm,$(ENGINE)),,-m "not vllm")

# NeMo-RL's own requirements go into a folder of their own, before those of vLLM (requirements/nemo-rl-test.txt says why).
# Its generation tests that need neither GPU nor network run with the integration enabled.
NEMO_RL_SITE := $(VENV)/nemo-rl
NEMO_RL_TESTS := fleet_health generation_router openai_server_utils vllm_chat_template_wiring vllm_collective_rpc \
  vllm_fp8_hf_overrides vllm_shard_selection vllm_spec_decode_clamp vllm_utils vllm_worker_helpers
NEMO_RL_PYTHON = NEMO_RL_SRC="$(abspath $(NEMO_RL_SRC))" PYTHONDONTWRITEBYTECODE=1 \
  PYTHONPATH="$(abspath $(NEMO_RL_SITE)):$(abspath $(NEMO_RL_SRC)):$(CURDIR)/tests/integrations/nemo_rl" \
  $(CURDIR)/$(BIN)/python
NEMO_RL_PYTEST = $(NEMO_RL_PYTHON) -m pytest -p no:cacheprovider

test-nemo-rl: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/vllm $(STAMPS)/nemo-rl
	test -f "$(NEMO_RL_SRC)/nemo_rl/__init__.py" || { echo "give NEMO_RL_SRC=DIR, a checkout of NeMo-RL"; exit 1; }
	$(NEMO_RL_PYTEST) tests/integrations/nemo_rl $(if $(filter vllm,$(ENGINE)),,-m "not vllm")
	cd "$(NEMO_RL_SRC)" && $(NEMO_RL_PYTEST) -p nemo_enabled --noconftest -o addopts= \
	  $(NEMO_RL_TESTS:%=tests/unit/models/generation/test_%.py)

bench-nemo-rl: $(STAMPS)/package $(STAMPS)/vllm $(STAMPS)/nemo-rl
	$(NEMO_RL_PYTHON) tests/integrations/nemo_rl/bench_nemo_rl.py

test-verl: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/vllm $(STAMPS)/verl
	$(BIN)/python -m pytest tests/integrations/verl

test-ray-serve: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/vllm $(STAMPS)/ray-serve
	$(BIN)/python -m pytest tests/integrations/ray_serve

# The C++ tests under ASan with UBSan, and under TSan.
sanitize: $(STAMPS)/system-test
	for preset in asan-ubsan tsan; do \
	  cmake --preset $$preset > /dev/null && cmake --build --preset $$preset --parallel $(JOBS) && \
	  ctest --preset $$preset --parallel $(JOBS) || exit 1; \
	done

fuzz: $(STAMPS)/system-fuzz $(STAMPS)/package $(STAMPS)/fuzz
	cmake --preset fuzz > /dev/null
	cmake --build --preset fuzz --parallel $(JOBS)
	$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS) --jobs $(FUZZ_JOBS) $(FUZZ)

soak: $(STAMPS)/package
	$(BIN)/python tests/soak/run.py --seconds $(SECONDS)

chaos: $(STAMPS)/package $(STAMPS)/test $(ENGINE_STAMP)
	PYTHONPATH=tests $(BIN)/python -m chaos.loss
	PYTHONPATH=tests $(BIN)/python -m chaos --engine $(if $(filter vllm,$(ENGINE)),both,sim) $(CHAOS)

bench: $(STAMPS)/package $(STAMPS)/bench
	$(BIN)/python benchmarks/run.py $(BENCH)

policies: $(STAMPS)/package $(STAMPS)/bench
	$(BIN)/python -m kvrouter.simulate.regret $(POLICIES) $(if $(POLICIES),--output out/policies)

lint: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/lint
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMPS)/lint
	$(BIN)/clang-format -i $(CXX_FILES)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build out

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# --- what the targets need ---

$(STAMPS)/system-build: scripts/install_system_packages.sh
	scripts/install_system_packages.sh build
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "kvrouter needs Python 3.10 or newer: set PYTHON=")'
	test -x $(BIN)/python || { echo "creating the Python environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/system-test: $(STAMPS)/system-build
	scripts/install_system_packages.sh test
	touch $@

$(STAMPS)/system-fuzz: $(STAMPS)/system-build
	scripts/install_system_packages.sh fuzz
	touch $@

$(STAMPS)/requirements: requirements/build.txt requirements/runtime.txt $(STAMPS)/system-build
	@echo "installing Python packages into $(VENV)"
	$(PIP) -r requirements/build.txt -r requirements/runtime.txt
	touch $@

$(STAMPS)/package: $(CXX_SOURCES) $(STAMPS)/requirements
	@echo "building kvrouter"
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) --no-build-isolation --no-deps --editable .
	touch $@

$(STAMPS)/test: requirements/test.txt $(STAMPS)/requirements
	$(PIP) -r requirements/test.txt
	touch $@

$(STAMPS)/nemo-rl: requirements/nemo-rl-test.txt $(STAMPS)/requirements
	rm -rf $(NEMO_RL_SITE)
	$(PIP) --no-deps --target $(NEMO_RL_SITE) -r requirements/nemo-rl-test.txt
	touch $@

$(STAMPS)/bench: requirements/bench.txt $(STAMPS)/requirements
	$(PIP) -r requirements/bench.txt
	touch $@

$(STAMPS)/fuzz: requirements/fuzz.txt $(STAMPS)/requirements
	$(PIP) -r requirements/fuzz.txt
	touch $@

$(STAMPS)/lint: requirements/lint.txt $(STAMPS)/system-build
	$(PIP) -r requirements/lint.txt
	touch $@

$(STAMPS)/vllm: scripts/install_vllm.py $(STAMPS)/requirements
	$(BIN)/python scripts/install_vllm.py
	touch $@

$(STAMPS)/verl: requirements/verl-test.txt $(STAMPS)/vllm
	$(PIP) --no-deps -r requirements/verl-test.txt
	touch $@

$(STAMPS)/ray-serve: requirements/ray-serve-test.txt $(STAMPS)/vllm
	$(PIP) --no-deps -r requirements/ray-serve-test.txt
	touch $@
