# Everything that a fresh machine needs: `make demo` and `make test`. `make help` lists the targets.
# Environments live in $(ENVS), one for each engine because their pins conflict; they are made again
# when what they are made of changes.
SHELL := bash
PYTHON ?= python3
ENGINE ?= vllm
ENVS ?= .envs
# Where the time goes: an engine tier is mostly starts.
SLOWEST = --durations=25 --durations-min=5
# numba throws away code that another version of it has compiled: a folder for each environment.
IN = scripts/tier.sh $(ENVS) $(1)

.PHONY: help demo test check test-fast test-engines test-vllm test-sglang test-long lint types clean env-vllm env-sglang
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

demo: env-$(ENGINE) ## serve a tiny model on two CPU ranks with zigzag, compare with one (ENGINE=vllm|sglang)
	$(call IN,$(ENGINE)) demo moe-placement demo --engine $(ENGINE)

test: ## build both environments and run all tests
	@rm -f $(ENVS)/times
	$(MAKE) --no-print-directory -j2 env-vllm env-sglang
	$(MAKE) --no-print-directory test-fast
	$(MAKE) --no-print-directory test-engines
	@column -t $(ENVS)/times

check: env-vllm lint types ## lint, format, types, and the tests that take less than 2 s each
	$(call IN,vllm) check python -m pytest -q -n 2 --dist worksteal -m "not engine and not slow and not sglang" tests

lint: env-vllm
	$(ENVS)/vllm/bin/ruff check .
	$(ENVS)/vllm/bin/ruff format --check .

types: env-vllm
	$(ENVS)/vllm/bin/mypy

# Two tests at once: most of them wait for a process of theirs half of their time.
test-fast: env-vllm ## the tests that start no engine
	$(call IN,vllm) fast python -m pytest -q -n 2 --dist worksteal $(SLOWEST) -m "not engine and not sglang" tests

# Side by side: each waits half of its time for processes that start one after the other.
test-engines: env-vllm env-sglang
	$(MAKE) --no-print-directory -j2 test-vllm test-sglang-and-long

test-sglang-and-long:
	$(MAKE) --no-print-directory test-sglang
	$(MAKE) --no-print-directory test-long

test-vllm: env-vllm ## vLLM's CPU engine
	$(call IN,vllm) vllm python -m pytest -q $(SLOWEST) -m "engine and not long and not sglang" tests

test-sglang: env-sglang ## SGLang's CPU engine
	$(call IN,sglang) sglang python -m pytest -q $(SLOWEST) -m "sglang or every_engine" tests

test-long: env-vllm ## what takes minutes without testing vLLM's patches: dying ranks, links that go down, accuracy
	$(call IN,vllm) long python -m pytest -q $(SLOWEST) -m "long and not sglang" tests

env-vllm env-sglang: env-%:
	@PYTHON=$(PYTHON) $(PYTHON) scripts/environment $* $(ENVS)/$*

clean: ## remove the environments
	rm -rf $(ENVS)
