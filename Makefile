# Two commands matter to a new user: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# Another index for torch alone, for machines where the default index serves CUDA builds (see README).
TORCH_INDEX ?=
# More words for `kubealign run`, such as ARGS="--set dpo.beta=0.2".
ARGS ?=
MIN_DISK_MB := 8000

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# The quiet environment, unless it is set already.
$(foreach setting,$(shell sed -n '/^[A-Z]/p' pipelines/quiet.env),$(eval export $(subst =, ?= ,$(setting))))

# Compiled modules are kept (see setup): without them every step would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.PHONY: demo
demo: data ## the whole pipeline on a small real model and real pairs
	@kubealign run $(ARGS)

# Test files side by side, each with one thread: two processes with two threads each would wait for one another.
TEST_JOBS ?= 2

.PHONY: test
test: export OMP_NUM_THREADS := 1
test: setup-dev data ## ruff, mypy, import-linter and all tests of the normal tier
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder -m "not long and not containers and not ci and not cluster" $(PYTEST_ARGS)

.PHONY: bench
bench: setup-dev data ## the training engine against TRL: time, memory, differences; an hour
	TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1 python tests/bench/training.py $(ARGS)

.PHONY: bench-gpu
bench-gpu: ## the training engine on one GPU against TRL: exactness, speed, memory; needs torch with CUDA, trl, datasets
	HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 python tests/bench/gpu.py $(ARGS)

.PHONY: gate-demo
gate-demo: setup-dev data ## a better, an equal, a worse and a lucky model before the gate, then rollback and verify; an hour and a half
	TRANSFORMERS_VERBOSITY=error TQDM_DISABLE=1 python tests/bench/gate_demo.py $(ARGS)

.PHONY: bench-data
bench-data: setup-dev data ## prepare and validate a million pairs with planted defects: time, memory, recall and precision
	python tests/bench/data.py $(ARGS)

.PHONY: test-models
test-models: setup-dev data ## every architecture through all stages, exported and read again by transformers 5 and 4
	pytest -m "long or not long" tests/training/test_model_matrix.py $(PYTEST_ARGS)

.PHONY: test-long
test-long: setup-dev data ## the full counts: kills, races, failures
	pytest -m long $(PYTEST_ARGS)

# What the images are built from: see components/Containerfile. BASE_IMAGE may name a digest, python@sha256:…. PIP_CONF is a pip.conf for indexes with a password.
ENGINE ?= docker
comma := ,
BASE_IMAGE ?= python:3.11-slim-bookworm
BUILD_ARGS ?=
PIP_CONF ?=

.PHONY: images
images: setup ## the container images of steps and MLflow, and their bills of materials and provenance below build/
	@for kind in data train mlflow; do \
	  image=$$(kubealign images $$kind); echo "building $$image"; \
	  DOCKER_BUILDKIT=1 $(ENGINE) build -q -f components/Containerfile --target $$kind -t $$image \
	    $$(kubealign images --build-args) --build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg TORCH_INDEX=$(TORCH_INDEX) \
	    $(if $(PIP_CONF),--secret id=pip.conf$(comma)src=$(PIP_CONF)) $(BUILD_ARGS) . >/dev/null; \
	  mkdir -p build; $(ENGINE) run --rm --network none $$image cat /opt/venv/sbom.cdx.json > build/sbom-$$kind.cdx.json; \
	  python tools/image_provenance.py $$image --target $$kind --engine $(ENGINE) --base $(BASE_IMAGE) \
	    --torch-index "$(TORCH_INDEX)" --sbom build/sbom-$$kind.cdx.json > build/provenance-$$kind.json; \
	  $(ENGINE) image inspect -f "$$image: {{.Size}} bytes" $$image; \
	done

# --strict: a package that the database says nothing of is no package without vulnerabilities.
AUDIT ?= pip-audit --strict -r requirements.lock --no-deps --disable-pip --progress-spinner off

.PHONY: audit
audit: setup-dev ## the locked dependencies against the database of known vulnerabilities
	@out=$$($(AUDIT) 2>&1) && echo "$$out" || { code=$$?; echo "$$out" | tail -40; \
	  ! grep -q -e "ConnectionError" -e "ServiceError" -e "Max retries" -e "could not be audited" <<< "$$out" \
	    || echo "error: the database of vulnerabilities cannot be reached from here: not everything was checked" >&2; exit $$code; }

.PHONY: test-containers
test-containers: setup-dev data ## the whole DAG in our images under a real engine
	pytest -m "containers and not long" $(PYTEST_ARGS)

.PHONY: ci-e2e
ci-e2e: setup-dev data ## the workflows' own commands, from a change of the data to a verdict, without any hosted CI
	pytest -m ci -s tests/ci $(PYTEST_ARGS)

.PHONY: check-manifests
check-manifests: setup-dev ## k8s/: built, then schemas, quantities, references and pod security
	@python tests/tools/manifests.py

.PHONY: test-cluster
test-cluster: setup-dev data ## MLflow as in k8s/ with a real PostgreSQL and S3: the pipeline, backup, restore, upgrade
	pytest -m cluster $(PYTEST_ARGS)

.PHONY: data
data: setup ## the embedded base model and data sets, by DVC
	@dvc repro --quiet || { code=$$?; echo "error: the data could not be made; the reason stands above" >&2; exit $$code; }

.PHONY: setup
setup: $(VENV)/.ready ## .venv with the locked packages that pipelines on this machine need

.PHONY: setup-dev
setup-dev: $(VENV)/.ready-dev ## .venv with what tests, benchmarks and checks need besides

INSTALL = $(VENV)/bin/python tools/install_locked.py $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

$(VENV)/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
	  || { echo "error: Python 3.11 is needed, found $$($(PYTHON) --version 2>&1 || echo none); install python3.11 or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "error: this Python has no venv module; on Debian and Ubuntu: apt-get install python3.11-venv" >&2; exit 2; }
	@free=$$(df -Pm . | awk 'NR == 2 {print $$4}'); [ "$$free" -ge $(MIN_DISK_MB) ] \
	  || { echo "error: $$free MB free here, $(MIN_DISK_MB) MB needed (packages 3 GB, model and runs the rest); free some or move the project" >&2; exit 2; }
	@echo "setting up $(VENV): about 1.7 GB of packages, 2 to 4 minutes"
	@[ -x $(VENV)/bin/python ] && $(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@$(INSTALL) local
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(INSTALL) dev
	@touch $@

.PHONY: readmes
readmes: setup-dev ## write the inputs and outputs of every component into its README
	python tests/tools/component_readmes.py

# LOCK_ARGS=--upgrade takes the newest of everything but torch. The index has torch's CUDA builds; the wheel that pip takes
# on this machine, or from TORCH_INDEX, has another hash, which is let in as well.
TORCH_VERSION ?= 2.13.0
LOCK_ARGS ?=
.PHONY: lock
lock: ## resolve the dependencies of all extras into requirements.lock, with hashes
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -q uv
	build/lock/bin/python -m pip download -q --no-deps -d build/lock $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH_VERSION)
	build/lock/bin/python tools/lock.py build/lock/torch-*.whl $(LOCK_ARGS)

.PHONY: clean
clean: ## remove what runs left behind (.kubealign); the environment and the data stay
	kubealign clean all --yes
