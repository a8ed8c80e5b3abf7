# Every command that a person needs. Each makes .venv by itself when it is missing or out of date.
PYTHON  ?= python3
PROFILE ?= lite
JOBS    ?=
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY   := .venv/.installed

# Run a command and say how long it took: $(call stage,name,command)
stage = @start=$$(date +%s); printf '==> %s\n' '$(1)'; $(2) && printf '    %s took %s s\n' '$(1)' "$$(($$(date +%s) - start))"

.DEFAULT_GOAL := help
.PHONY: help book test format sync lock colab-check checkpoints measure experiments bench clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

book: $(READY)  ## run the notebooks (PROFILE=smoke|lite|full, JOBS=) and build the HTML from what they printed
	$(call stage,notebooks at the $(PROFILE) profile,pgseg book execute --profile $(PROFILE) --jobs $(or $(JOBS),1))
	$(call stage,pages,pgseg book build --executed _build/executed)

test: $(READY)  ## lint, unit tests, pairs, papermill at smoke, nbval, the book as committed, pages in Chromium
	$(call stage,lint,ruff check . && ruff format --check .)
	python -m pytest -n logical --dist loadgroup

format: $(READY)  ## put code and notebooks into the project's format
	ruff check --fix . && ruff format .

sync: $(READY)  ## make each .ipynb from its .md, keeping the outputs of unchanged cells
	pgseg book sync

lock: pyproject.toml  ## resolve requirements.txt anew in a clean environment (TORCH=2.13.0)
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -qq "torch==$(or $(TORCH),2.13.0)" '.[book,test]'
	{ printf '%s\n' '# The exact environment of book and tests: `make lock` writes it, `make test` proves it. Never for Colab.' \
	    '# What torch itself brings along on a machine with a GPU (CUDA, Triton) is pinned by torch, not here.'; \
	  .venv-lock/bin/python -m pip freeze --all --exclude pgseg-lite --exclude pip --exclude wheel \
	  | grep -vE '^(nvidia|cuda|triton)' | sed -E 's/\+[a-z0-9.]+$$//'; } > requirements.txt
	rm -rf .venv-lock build

colab-check: $(READY)  ## ask a resolver whether pyproject.toml fits what Colab has (nothing is installed)
	uv pip compile --quiet --no-header --no-annotate --system-certs --python-version 3.13 \
	    --constraint constraints-colab.txt --extra sam3 pyproject.toml > _build/colab.txt
	@echo "Colab's versions satisfy pyproject.toml on Python 3.13; the resolution is in _build/colab.txt"

checkpoints: $(READY)  ## train the two small checkpoints that ship in the package
	python benchmarks/make_checkpoints.py

measure: $(READY)  ## measure what stands beside the experiments: a larger budget, a blind mask (needs PGSEG_DATA)
	python benchmarks/measure_consep.py
	python benchmarks/measure_blind.py
	python benchmarks/compute_cost.py

experiments: $(READY)  ## run every experiment of the book and store its tables (needs PGSEG_DATA; PROFILE=, JOBS=)
	for name in table1 table2 table4 table5 table5_colour causes causes_presence causes_beta; do pgseg experiment $$name --profile $(PROFILE) $(if $(JOBS),--jobs $(JOBS)) || exit 1; done
	for name in imprecise evolve preferences; do pgseg experiment $$name --profile $(PROFILE) || exit 1; done

bench: $(READY)  ## time the pieces side by side
	for script in benchmarks/bench_*.py; do python "$$script" || exit 1; done

# Finished runs may have taken days of a GPU; delete these folders by hand.
RUNS := experiments checkpoints consep

clean:  ## remove what was built; .venv stays, and so do the trained runs in _build
	mkdir -p _build && find _build -mindepth 1 -maxdepth 1 $(RUNS:%=-not -name %) -exec rm -rf {} +
	rm -rf build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# requirements.txt is a complete lock, so the package itself needs neither dependencies nor a build environment.
$(READY): requirements.txt pyproject.toml
	@echo 'making .venv from requirements.txt; this takes some minutes the first time'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(call stage,environment,.venv/bin/python -m pip install -qq -r requirements.txt \
	    && .venv/bin/python -m pip install -qq --no-deps --no-build-isolation -e .)
	@mkdir -p _build && touch $@
