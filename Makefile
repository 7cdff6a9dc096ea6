# Everything a fresh machine needs: `make demo` and `make test`. Environments live in .envs/, one for each engine
# because their pins conflict, and are made again when their requirement files change.
PYTHON ?= python3
ENGINE ?= vllm
ENVS ?= .envs
# Where the time goes: an engine tier is mostly starts.
SLOWEST = --durations=25 --durations-min=5

.PHONY: demo test test-fast test-vllm test-sglang lint clean env-vllm env-sglang

demo: env-$(ENGINE)
	$(ENVS)/$(ENGINE)/bin/moe-placement demo --engine $(ENGINE)

# Both environments at once, then the fast tier first: it fails within minutes.
test:
	$(MAKE) -j2 env-vllm env-sglang
	$(MAKE) test-fast
	$(MAKE) test-vllm
	$(MAKE) test-sglang

# No engine is started, so that two tests may run at once: most of them wait for a process of theirs half of their time.
test-fast: env-vllm
	$(ENVS)/vllm/bin/python -m pytest -q -n 2 --dist worksteal $(SLOWEST) -m "not engine" --ignore=tests/sglang tests

test-vllm: env-vllm
	$(ENVS)/vllm/bin/python -m pytest -q $(SLOWEST) -m engine --ignore=tests/sglang tests

test-sglang: env-sglang
	$(ENVS)/sglang/bin/python -m pytest -q $(SLOWEST) tests/sglang tests/loop/test_sglang_recording.py tests/planner/test_adapters.py tests/verify/test_accuracy_sglang.py tests/moe/test_engine_matmuls.py

lint: env-vllm
	$(ENVS)/vllm/bin/ruff check .

env-vllm env-sglang: env-%:
	PYTHON=$(PYTHON) scripts/env-$*.sh $(ENVS)/$*

clean:
	rm -rf $(ENVS)
