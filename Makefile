# `make` or `make help` lists the targets. Names in CAPITALS belong to make, all others go to Hydra as overrides:
#     make train rollout=vllm seed=1 data.audio=silent
# EXPERIMENT=name  DRY=1  NPROC=2 (processes)  ARGS='-m seed=0,1,2' (whatever make cannot read)
# MODEL=folder (serve, demo)    EXTRA=cpu|gpu    PYTHON=python3.11    TESTS=tests/grpo    UV=uv
# CLUSTER=mine (conf/cluster/mine.yaml)    SLURM='nodes=2 time=02:00:00' (its keys, for once)    JOB=name or number

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(if $(shell command -v python3.11),python3.11,python3)
EXTRA  ?= auto
NPROC  ?= 1
TESTS  ?= tests
UV     ?= uv

VENV  := .venv
STAMP := $(VENV)/.stamp
BIN   := $(VENV)/bin

# DeepSpeed looks for ninja on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM ?= false
# torch 2.13 announces a change once per collective.
export PYTHONWARNINGS ?= ignore::FutureWarning
# More threads than processes can feed only get into each other's way; a tiny model gains nothing past 8.
export OMP_NUM_THREADS ?= $(if $(filter 1,$(NPROC)),$(shell n=$$(nproc); echo $$((n > 8 ? 8 : n))),1)
# On a CPU, compiling costs vLLM's first answer 20 s and wins nothing. Read when a recipe runs: set-up writes the stamp.
export TORCHDYNAMO_DISABLE = $(if $(filter gpu,$(file < $(STAMP))),0,1)

# The overrides: MAKEOVERRIDES has their names (the last one first), $(value) their text as it
# was typed, which goes on in single quotes. No variable here has a name in small letters, which an override might take.
OURS     := ARGS CLUSTER DRY EXPERIMENT EXTRA JOB MODEL NPROC PYTHON SLURM TESTS UV VENV OMP_NUM_THREADS PYTHONWARNINGS TOKENIZERS_PARALLELISM
REVERSED  = $(if $(1),$(call REVERSED,$(wordlist 2,$(words $(1)),$(1))) $(firstword $(1)))
GIVEN    := $(foreach W,$(call REVERSED,$(MAKEOVERRIDES)),$(if $(findstring =,$(W)),$(firstword $(subst =, ,$(W)))))
GIVEN    := $(foreach W,$(GIVEN),$(if $(filter command,$(firstword $(origin $(W)))),$(W)))
CAPITALS := $(if $(GIVEN),$(shell printf '%s\n' '$(subst $() ,' ',$(strip $(GIVEN)))' | grep -xE '[A-Z_]+'))
UNKNOWN  := $(filter-out $(OURS),$(CAPITALS))
$(if $(UNKNOWN),$(error $(UNKNOWN) is unknown. Names in capitals belong to make: $(OURS)))
HYDRA     = $(foreach W,$(filter-out $(CAPITALS),$(GIVEN)),'$(subst ','\'',$(W)=$(value $(W)))')

RUN = $(BIN)/python $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node=$(NPROC) )-m

# Where jobs go: the words of SLURM, each as --set KEY=VALUE.
SITE = $(if $(CLUSTER), --cluster '$(CLUSTER)')$(foreach W,$(SLURM), --set '$(W)')

.PHONY: help setup train plan audit serve demo test bench bench-gpu docs lint format lock clean fetch doctor test-slurm slurm-train slurm-sweep slurm-eval slurm-status slurm-cancel slurm-logs FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv from the lock file; does nothing when it is up to date

# A set-up of the other kind (EXTRA=gpu over cpu) is made anew.
$(STAMP): pyproject.toml requirements/cpu.txt requirements/gpu.txt launch/setup.py launch/cpu_wheels.py \
          $(if $(filter-out auto $(file < $(STAMP)),$(EXTRA)),FORCE)
	$(PYTHON) launch/setup.py --extra $(EXTRA) --venv $(VENV)

train: $(STAMP) ## train; words like seed=1 are config overrides, EXPERIMENT=name, DRY=1, NPROC=2
	$(RUN) grpo.train$(if $(ARGS), $(ARGS))$(if $(EXPERIMENT), experiment=$(EXPERIMENT))$(if $(DRY), dry_run=true)$(if $(HYDRA), $(HYDRA))

plan: $(STAMP) ## memory, bytes, work and time of a run, without a GPU: make plan EXPERIMENT=name placement=8gpu
	$(BIN)/python -m grpo.plan$(if $(ARGS), $(ARGS))$(if $(EXPERIMENT), experiment=$(EXPERIMENT))$(if $(HYDRA), $(HYDRA))

audit: ## known vulnerabilities of the locked packages; needs pip-audit and a network, and says so without
	$(PYTHON) launch/audit.py

serve: $(STAMP) ## vLLM's OpenAI-compatible server of an export: make serve MODEL=OUT ARGS='--port 8000'
	$(BIN)/python -m grpo.serve --model '$(or $(MODEL),$(error make serve MODEL=OUT, a folder that grpo.export wrote))'$(if $(ARGS), $(ARGS))

demo: $(STAMP) ## a web page to ask a model about a clip; MODEL=OUT, else the newest run
	$(BIN)/python -m grpo.demo$(if $(MODEL), --model '$(MODEL)')$(if $(ARGS), $(ARGS))

# Two processes share the cores already.
test: export OMP_NUM_THREADS := 1
test: export HF_HUB_OFFLINE = 1
test: $(STAMP) ## run the tests; TESTS=tests/grpo runs some
	$(BIN)/python -m pytest -q -rs --durations=10 -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(TESTS)

slurm-train: $(STAMP) ## train on a cluster: CLUSTER=mine SLURM='nodes=2' EXPERIMENT=name; DRY=1 prints what would be submitted
	@$(BIN)/python -m launch.slurm train$(SITE)$(if $(DRY), --dry)$(if $(ARGS), $(ARGS))$(if $(EXPERIMENT), experiment=$(EXPERIMENT))$(if $(HYDRA), $(HYDRA))

slurm-sweep: $(STAMP) ## a run for each combination, as an array of jobs: make slurm-sweep CLUSTER=mine ARGS='seed=0,1,2'
	$(if $(DRY)$(SLURM),$(error slurm-sweep takes neither DRY nor SLURM: its jobs ask for what the file of CLUSTER says))$(if $(CLUSTER),CLUSTER='$(CLUSTER)' )$(BIN)/python -m grpo.train -m hydra/launcher=slurm$(if $(ARGS), $(ARGS))$(if $(EXPERIMENT), experiment=$(EXPERIMENT))$(if $(HYDRA), $(HYDRA))

slurm-eval: $(STAMP) ## grpo.evaluate on a cluster: make slurm-eval CLUSTER=mine ARGS='model=outputs/mine bench=mmar'
	@$(BIN)/python -m launch.slurm eval$(SITE)$(if $(DRY), --dry)$(if $(ARGS), $(ARGS))$(if $(HYDRA), $(HYDRA))

slurm-status: $(STAMP) ## your jobs, and how far their runs are; JOB=name or number
	@$(BIN)/python -m launch.slurm status$(SITE)$(if $(JOB), '$(JOB)')

slurm-cancel: $(STAMP) ## end a job: make slurm-cancel JOB=name or number
	@$(BIN)/python -m launch.slurm cancel$(SITE) '$(or $(JOB),$(error make slurm-cancel JOB=name or number))'

slurm-logs: $(STAMP) ## the output of a job: make slurm-logs JOB=name or number; ARGS=-f follows it
	@$(BIN)/python -m launch.slurm logs$(SITE)$(if $(ARGS), $(ARGS)) '$(or $(JOB),$(error make slurm-logs JOB=name or number))'

fetch: $(STAMP) ## before a job without network: the model of EXPERIMENT=name into the cache, and is its data there?
	$(BIN)/python -m grpo.fetch$(if $(ARGS), $(ARGS))$(if $(EXPERIMENT), experiment=$(EXPERIMENT))$(if $(HYDRA), $(HYDRA))

doctor: ## is this machine fit? versions, GPUs, network, memory, disk; also on a node: srun make doctor
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m launch.doctor$(if $(ARGS), $(ARGS))

test-slurm: export HF_HUB_OFFLINE = 1
test-slurm: $(STAMP) ## a real two-node SLURM on this machine (Debian's slurm-wlm and munge; root), and jobs on it
	$(BIN)/python -m pytest -q -rs --durations=10 -m slurm tests/launch/test_slurm_cluster.py

bench: $(STAMP) ## claims of docs/performance.md, measured here; ARGS=engines: whole runs of each rollout engine
	$(BIN)/python -m grpo.bench $(ARGS) $(HYDRA)

bench-gpu: $(STAMP) ## at the true 7B shapes, random weights (16 GB in .cache); skips without a GPU
	$(BIN)/python -m grpo.bench --gpu $(ARGS) $(HYDRA)

docs: $(STAMP) ## write the pages made from code anew: losses, advantages, metrics
	$(BIN)/python -m grpo.lossdocs
	$(BIN)/python -m grpo.metrics > docs/metrics.md

lint: $(STAMP) ## ruff: faults and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## ruff: mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# uv must find torch's CPU build for cpu.txt: UV_EXTRA_INDEX_URL or UV_FIND_LINKS. For gpu.txt they are put aside, lest it
# take that build too. No address goes into the files.
COMPILE = $(UV) pip compile pyproject.toml --quiet --extra dev --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
          --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links
lock: ## resolve pyproject.toml again into requirements/*.txt (needs uv)
	@command -v $(UV) > /dev/null || { echo "make lock needs uv: pip install uv, or make lock UV=path" >&2; exit 1; }
	{ echo '# Linux, x86_64, Python 3.11, no GPU. Made by `make lock`: do not edit.'; \
	  echo '# triton and torchcodec are left out (cpu-overrides.txt): install with --no-deps, as `make setup` does.'; \
	  $(COMPILE) --extra cpu --overrides requirements/cpu-overrides.txt; } > requirements/cpu.txt.new
	{ echo '# Linux, x86_64, Python 3.11, NVIDIA GPU. Made by `make lock`: do not edit.'; \
	  echo '# Resolved only: nobody has installed this set on a GPU machine yet.'; \
	  env -u UV_EXTRA_INDEX_URL -u UV_FIND_LINKS $(COMPILE) --extra gpu; } > requirements/gpu.txt.new
	cd requirements && mv cpu.txt.new cpu.txt && mv gpu.txt.new gpu.txt

clean: ## remove .venv and tools' caches; keeps runs (outputs/) and made data (.cache/)
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache dist
	find . -name __pycache__ -type d -not -path './outputs/*' -prune -exec rm -rf {} +
